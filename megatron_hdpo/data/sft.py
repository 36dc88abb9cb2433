"""Supervised examples for the warm-up of weak models: prompts with their worked solutions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hdpo.data.order import ProblemOrder
from megatron_hdpo.data.prompts import PromptBuilder
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.problem import Problem


@dataclass(frozen=True)
class SupervisedExample:
    """One prompt and its solution: prompt_ids int32 [P], response_ids int32 [R] with the end-of-sequence token last."""

    problem: Problem
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    privileged: bool


class SupervisedData:
    """Batches of supervised examples: a pure function of problems, seed and step."""

    def __init__(
        self,
        problems: Sequence[Problem],
        prompts: PromptBuilder,
        privileged_share: float = 0.0,
        max_response_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        """Keep the problems whose solution fits max_response_tokens (end included); `left_out` counts the others.

        Raises DataError when none is left, when the tokenizer has no end-of-sequence token, or for a share outside [0,
        1].
        """
        if not 0.0 <= privileged_share <= 1.0:
            raise DataError(f"privileged_share must be between 0 and 1, not {privileged_share}")
        self.prompts, self.privileged_share, self.seed = prompts, privileged_share, seed
        self._responses = {p.id: response_ids(p.solution, prompts) for p in problems if p.solution}
        limit = max_response_tokens or max((len(ids) for ids in self._responses.values()), default=0)
        kept = [p for p in problems if 0 < len(self._responses.get(p.id, ())) <= limit]
        if not kept:
            raise DataError(f"none of {len(problems)} problems has a worked solution of at most {limit} tokens")
        self.left_out = len(problems) - len(kept)
        self._order = ProblemOrder(kept, seed=seed)

    def batch(self, step: int, size: int) -> list[SupervisedExample]:
        """Return the `size` examples of a step.

        The number of privileged prompts is `size` times their share, rounded up or down at random such that the mean is
        exact.
        """
        rng = random.Random(f"{self.seed}/sft/{step}")
        problems = self._order.batch(step, size)
        count = int(self.privileged_share * size + rng.random())
        chosen = set(rng.sample(range(size), count))
        return [self._example(problem, index in chosen) for index, problem in enumerate(problems)]

    def _example(self, problem: Problem, privileged: bool) -> SupervisedExample:
        prompt_ids = self.prompts.privileged_prompt(problem) if privileged else self.prompts.student(problem)
        return SupervisedExample(problem, prompt_ids, self._responses[problem.id], privileged)


def response_ids(solution: str, prompts: PromptBuilder) -> np.ndarray:
    """Return the ids int32 [R] of a solution as the model would sample it: no special token but the end of sequence."""
    eos = prompts.tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no end-of-sequence token, so responses cannot be taught to end")
    ids = prompts.data_ids(solution)
    unknown = prompts.tokenizer.unk_token_id
    if unknown is not None and unknown in ids and prompts.tokenizer.decode([unknown]) not in solution:
        raise DataError(f"the tokenizer has no token for some characters of this solution: {solution[:200]!r}")
    return np.asarray([*ids, eos], dtype=np.int32)
