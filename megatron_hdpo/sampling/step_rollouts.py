"""Rollouts of a step on all ranks: every rank has the outlines, each group is held by the rank that sampled it.

A group is moved only to the ranks that learn from it (`delivery.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.types.learning import Objective
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Group, GroupOutline, outline_of


@dataclass
class StepRollouts:
    """Groups of a step.

    outlines: of all groups, the same on every rank. holders: the rank that holds each group, None where every rank
    does. held: the groups that this rank holds, by index.
    """

    outlines: list[GroupOutline] = field(default_factory=list)
    holders: list[int | None] = field(default_factory=list)
    held: dict[int, Group] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.outlines)

    def __add__(self, more: StepRollouts) -> StepRollouts:
        """Return these groups and after them those of `more`."""
        held = self.held | {len(self) + index: group for index, group in more.held.items()}
        return StepRollouts(self.outlines + more.outlines, self.holders + more.holders, held)

    def select(self, indices: Sequence[int]) -> StepRollouts:
        """Return the groups with these indices, in this order."""
        held = {new: self.held[old] for new, old in enumerate(indices) if old in self.held}
        return StepRollouts([self.outlines[i] for i in indices], [self.holders[i] for i in indices], held)


def on_every_rank(groups: Sequence[Group]) -> StepRollouts:
    """Return the rollouts of a step whose groups every rank holds already."""
    return StepRollouts(list(map(outline_of, groups)), [None] * len(groups), dict(enumerate(groups)))


def gather_outlines(
    held: Mapping[int, Group], context: ParallelContext, problems: Sequence[Problem] | None = None
) -> StepRollouts:
    """Return the rollouts of a step from the groups that each rank holds, by the index of their problem. Collective.

    problems: of the step, the same on every rank, so that they need not be sent. None: they are sent.
    """
    own = {index: outline_of(group) for index, group in held.items()}
    if problems is not None:
        own = {index: replace(outline, problem=None) for index, outline in own.items()}  # type: ignore[arg-type]
    found = {
        index: (outline, rank)
        for rank, outlines in enumerate(context.gather_objects(own))
        for index, outline in outlines.items()
    }
    outlines = [found[index][0] for index in range(len(found))]
    if problems is not None:
        outlines = [replace(outline, problem=problem) for outline, problem in zip(outlines, problems, strict=True)]
    return StepRollouts(outlines, [found[index][1] for index in range(len(found))], dict(held))


def gather_signals(rollouts: StepRollouts, objective: Objective, context: ParallelContext) -> list[bool]:
    """Return for each group whether it can change the policy. Collective.

    The holder of a group answers, because an objective may look at its texts.
    """
    own = {index: objective.has_signal(group) for index, group in rollouts.held.items()}
    found = {index: signal for part in context.gather_objects(own) for index, signal in part.items()}
    return [found[index] for index in range(len(rollouts))]


def gather_counts(rollouts: StepRollouts, objective: Objective, context: ParallelContext) -> dict[str, float]:
    """Return the objective's counts of all groups. Collective; of groups that every rank holds, rank 0 counts."""
    own = [group for index, group in sorted(rollouts.held.items()) if (rollouts.holders[index] or 0) == context.rank]
    parts = context.gather_objects(objective.counts(own))
    return {name: sum(part.get(name, 0.0) for part in parts) for part in parts for name in part}
