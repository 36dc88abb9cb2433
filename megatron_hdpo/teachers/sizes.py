"""Check of a teacher's vocabulary size against the student's."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_hdpo.model.architecture import Architecture


def check_sizes(teacher: Architecture, student: Architecture, path: str) -> Iterator[str]:
    """Yield an error if the teacher's vocabulary is smaller than the student's: the other tokens would have no target.

    A larger one is allowed: model families pad their vocabularies to different sizes. Rows beyond the student's
    vocabulary get no probability.
    """
    if teacher.vocab_size < student.vocab_size:
        yield (
            f"teacher.path: {path} has a vocabulary of {teacher.vocab_size} tokens, the model {student.vocab_size}: a "
            "teacher must have every token of the student"
        )
