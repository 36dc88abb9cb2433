"""Micro-batches as the planner sees them: how many rows, responses and targets, not which."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_hdpo.costs.layout import Layout


@dataclass(frozen=True)
class PackedShape:
    """A packed micro-batch on one rank.

    rows: tokens, padding included; of context-parallel ranks each has its part. length: of its sequences, for the cost
    of attention. responses: rows that the head reads. targets: those with a teacher's top k. two_temperatures:
    surrogate and divergence differ in it. bucket: the divergence keeps the tail in one bucket. full: targets are a
    teacher's hidden states, so over the whole vocabulary.
    """

    rows: int
    length: int
    responses: int
    targets: int = 0
    top_k: int = 0
    two_temperatures: bool = False
    bucket: bool = False
    full: bool = False

    def padded(self, layout: Layout) -> PackedShape:
        """With rows rounded up as sequence parallelism needs."""
        step = layout.sequence_ranks
        return replace(self, rows=-(-self.rows // step) * step)


@dataclass(frozen=True)
class Repeated:
    """So many micro-batches of one shape."""

    shape: PackedShape
    count: int
