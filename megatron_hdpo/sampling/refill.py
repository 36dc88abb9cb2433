"""Dynamic sampling (DAPO, arXiv 2503.14476): replaces groups that cannot change the policy by further problems."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from megatron_hdpo.types.learning import Objective
from megatron_hdpo.types.rollouts import Group

SampleMore = Callable[[int, int, Collection[str]], list[Group]]
"""(round, number of groups, ids of problems to leave out) -> groups of further problems."""


def refilled(
    groups: Sequence[Group], rounds: int, size: int, objective: Objective, sample_more: SampleMore
) -> list[Group]:
    """Return all groups of a step: the first ones, and the groups that `rounds` rounds of refilling add.

    size: wanted groups with signal. Each round samples as many further problems as are missing.
    """
    groups = list(groups)
    for turn in range(rounds):
        missing = size - len(with_signal(groups, size, objective))
        if not missing:
            break
        groups += sample_more(turn, missing, {group.problem.id for group in groups})
    return groups


def with_signal(groups: Sequence[Group], size: int, objective: Objective) -> list[Group]:
    """Return the first `size` groups that can change the policy."""
    return [group for group in groups if objective.has_signal(group)][:size]
