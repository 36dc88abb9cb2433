"""Watch on rollouts that fail: a share that is worth a warning, and steps that have nothing to learn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from megatron_hdpo.model.policy import TrainingError
from megatron_hdpo.types.rollouts import GroupOutline

FAILED = ("generation_failed", "check_failed", "privileged_generation_failed", "privileged_check_failed")
"""Reasons in `GroupOutline.dropped` that are failures, not choices; student and privileged rollouts are counted apart.

`check_failed/judge` is the failure of the reward function `judge`, and counts as `check_failed` too.
"""


def count_failures(groups: Sequence[GroupOutline]) -> Counter[str]:
    """Return how many rollouts of these groups failed, by the reasons of FAILED."""
    counts: Counter[str] = Counter()
    for group in groups:
        for reason, count in group.dropped.items():
            counts[reason.partition("/")[0]] += count
    return Counter({reason: counts[reason] for reason in FAILED})


class FailedRollouts:
    """Watches the steps of a run.

    max_share: of a step's rollouts, student and privileged ones, that may fail without a warning. max_empty_steps:
    steps in a row without a single rollout that end the run. warn: gets the warning.
    """

    def __init__(self, max_share: float, max_empty_steps: int, warn: Callable[[str], object]) -> None:
        self.max_share = max_share
        self.max_empty_steps = max_empty_steps
        self.warn = warn
        self._empty_steps = 0

    def watch(self, step: int, groups: Sequence[GroupOutline], cause: str) -> None:
        """Take note of the groups of a step.

        cause: the most frequent error of the step. Raises TrainingError when the run has had nothing to learn from for
        too long: it would train on nothing to its last step.
        """
        sampled = sum(len(g.samples) + len(g.privileged_samples) for g in groups)
        failed = count_failures(groups).total()
        self._empty_steps = 0 if sampled else self._empty_steps + 1
        if self._empty_steps >= self.max_empty_steps:
            raise TrainingError(
                f"no rollout of the last {self._empty_steps} steps could be used; in step {step} most often: {cause}. "
                "Nothing was learned in these steps (rollout.max_empty_steps)"
            )
        if failed > self.max_share * (sampled + failed):
            self.warn(
                f"step {step}: {failed} of {sampled + failed} rollouts failed and were dropped, most often: {cause}; "
                "see the logs of the ranks (rollout.max_failed_share)"
            )
