"""Dynamic sampling (DAPO, arXiv 2503.14476): replaces groups that cannot change the policy by further problems."""

from __future__ import annotations

from collections.abc import Callable, Collection

from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.sampling.step_rollouts import StepRollouts, gather_signals
from megatron_hdpo.types.learning import Objective

SampleMore = Callable[[int, int, Collection[str]], StepRollouts]
"""(round, number of groups, ids of problems to leave out) -> groups of further problems."""


def refilled(
    rollouts: StepRollouts,
    rounds: int,
    size: int,
    objective: Objective,
    context: ParallelContext,
    sample_more: SampleMore,
) -> StepRollouts:
    """Return all groups of a step: the first ones, and the groups that `rounds` rounds of refilling add. Collective.

    size: wanted groups with signal. Each round samples as many further problems as are missing.
    """
    for turn in range(rounds):
        missing = size - len(with_signal(rollouts, size, objective, context))
        if not missing:
            break
        rollouts += sample_more(turn, missing, {outline.problem.id for outline in rollouts.outlines})
    return rollouts


def with_signal(rollouts: StepRollouts, size: int, objective: Objective, context: ParallelContext) -> StepRollouts:
    """Return the first `size` groups that can change the policy. Collective."""
    signals = gather_signals(rollouts, objective, context)
    return rollouts.select([index for index, signal in enumerate(signals) if signal][:size])
