"""Metrics of the reward functions of a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from megatron_hdpo.types.rollouts import GroupOutline

_FAILED = ("check_failed", "privileged_check_failed")
_NEVER_JUDGED = ("generation_failed", "stopped_early")
"""Reasons why a rollout never came to be judged; of privileged ones with `privileged_` in front."""


def reward_metrics(groups: Sequence[GroupOutline]) -> dict[str, float]:
    """Return `reward/<name>` and `reward/<name>/failed` of each reward function; {} where there are none.

    The first is the mean of its values over the student rollouts, before the weight; the second the share of all
    rollouts that were judged, student and privileged ones, that were dropped because it failed.
    """
    students = [sample for group in groups for sample in group.samples]
    judged = [*students, *(sample for group in groups for sample in group.privileged_samples)]
    failed: Counter[str] = Counter()
    rollouts = len(judged)  # privileged ones that were judged and then filtered are among the dropped
    for group in groups:
        for reason, count in group.dropped.items():
            kind, _, name = reason.partition("/")
            rollouts += 0 if kind.removeprefix("privileged_") in _NEVER_JUDGED else count
            if name and kind in _FAILED:
                failed[name] += count
    names = sorted({*failed, *(name for sample in judged for name in sample.components)})
    metrics = {f"reward/{name}/failed": failed[name] / rollouts for name in names}
    for name in names:
        if values := [sample.components[name] for sample in students if name in sample.components]:
            metrics[f"reward/{name}"] = float(np.mean(values))
    return metrics
