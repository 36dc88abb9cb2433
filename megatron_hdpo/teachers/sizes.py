"""Whether a teacher's vocabulary can teach a student's."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_hdpo.model.architecture import Architecture


def check_sizes(teacher: Architecture, student: Architecture, path: str) -> Iterator[str]:
    """An error where the teacher has fewer tokens than the student: it says nothing of the others.

    More are allowed: families pad their vocabularies to different sizes. Rows beyond the student's get no probability.
    """
    if teacher.vocab_size < student.vocab_size:
        yield (
            f"teacher.path: {path} has a vocabulary of {teacher.vocab_size} tokens, the model {student.vocab_size}: a "
            "teacher must know every token of the student"
        )
