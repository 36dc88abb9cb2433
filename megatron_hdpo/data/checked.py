"""The problems of one task that can be used: gold answers that parse, texts that can be encoded, prompts that fit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hdpo.data.plain_text import NotEncodable
from megatron_hdpo.data.prompts import Hint, PromptBuilder, PromptTooLong
from megatron_hdpo.data.tasks import Task
from megatron_hdpo.data.tasks.files import FileTaskBase
from megatron_hdpo.data.tasks.rows import question_key
from megatron_hdpo.data.text_tokens import NoTokenForText
from megatron_hdpo.rewards.gold import GoldVerdict
from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.problem import Problem

ENCODED_AT_LOAD = 100
"""Problems of each task that are encoded at load, if the tokenizer has a token for every text; else all of them are."""

CheckGolds = Callable[[Sequence[str]], Mapping[str, GoldVerdict]]


@dataclass(frozen=True)
class CheckedProblems:
    """The problems of a task that can be used.

    question_hashes: uint64 [N], equal for questions with equal `question_key`. report: what was dropped. certain:
    whether checking again would give the same, which a gold answer that took too long to parse prevents.
    """

    problems: list[Problem]
    question_hashes: np.ndarray
    report: LoadReport
    certain: bool = True


@dataclass(frozen=True)
class ProblemChecker:
    """Checks of problems against the prompts that a run will ask for.

    privileged: prompts with the ground truth, so they must fit too. hints: prompts with hints, so their problem must
    fit.
    """

    prompts: PromptBuilder
    check_golds: CheckGolds
    privileged: bool = True
    hints: bool = False

    def check(self, task: Task) -> CheckedProblems:
        """Return the usable problems of a task. Raises DataError for what may not be dropped."""
        report, certain = LoadReport(), True
        problems = task.problems(report)
        if isinstance(task, FileTaskBase) and task.needs_parsed_gold:
            problems, certain = self._with_readable_gold(task, problems, report)
        kept = [problem for index, problem in enumerate(problems) if self._fits(task, problem, index, report)]
        return CheckedProblems(kept, question_hashes(kept), report, certain)

    def _with_readable_gold(
        self, task: FileTaskBase, problems: Sequence[Problem], report: LoadReport
    ) -> tuple[list[Problem], bool]:
        verdicts = self.check_golds([problem.answer for problem in problems])
        kept = []
        for problem in problems:
            error = verdicts[problem.answer].error
            if error is None:
                kept.append(problem)
            else:
                message = f"{problem.metadata['source']}: {error}"
                report.reject(task.task_name, task.on_bad_row, "gold answer not readable", message)
        return kept, all(verdict.certain for verdict in verdicts.values())

    def _fits(self, task: Task, problem: Problem, index: int, report: LoadReport) -> bool:
        token = self.prompts.control_token(problem)
        try:
            if not self.prompts.can_encode(problem):
                raise NotEncodable("the tokenizer cannot read it as ordinary characters")
            whole = self.prompts.check_length(problem, self.privileged, self.hints)
            if index < ENCODED_AT_LOAD or self.prompts.may_lack_tokens or token:
                self._encode(problem)
        except NotEncodable as error:
            found = token or "a code point that Unicode keeps for programs"
            report.drop(problem.task, "special token in its text", f"{problem.id} contains {found}: {error}")
            return False
        except PromptTooLong as error:
            report.drop(problem.task, "prompt too long", str(error))
            return False
        except NoTokenForText as error:
            if not isinstance(task, FileTaskBase):  # no rows that could be corrected or dropped
                raise
            report.reject(task.task_name, task.on_bad_row, "no token", f"{problem.metadata['source']}: {error}")
            return False
        if not whole:
            report.cut[problem.task] = report.cut.get(problem.task, 0) + 1
        if token:
            report.escape(problem.task, f"{problem.id} contains {token}")
        return True

    def _encode(self, problem: Problem) -> None:
        """Encode every prompt that a run may ask for. Raises NoTokenForText."""
        self.prompts.student(problem)
        if self.privileged:
            self.prompts.privileged_prompt(problem)
        if self.hints:
            self.prompts.hinted(problem, Hint())


def question_hashes(problems: Sequence[Problem]) -> np.ndarray:
    """Return a number for each question, uint64 [N]: equal for questions with equal `question_key`."""
    hashes = (hashlib.blake2b(question_key(p.question).encode(), digest_size=8).digest() for p in problems)
    return np.frombuffer(b"".join(hashes), dtype="<u8")
