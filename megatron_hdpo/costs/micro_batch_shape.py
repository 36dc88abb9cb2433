"""Shapes of micro-batches: numbers of rows, responses and targets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_hdpo.costs.layout import Layout


@dataclass(frozen=True)
class PackedShape:
    """Shape of a packed micro-batch on one rank.

    rows: tokens, padding included; each context-parallel rank has its part. length: of the sequences, for the cost of
    attention. responses: rows that the head reads. targets: responses with a teacher's top k. two_temperatures:
    surrogate and divergence have different ones. bucket: the divergence has one bucket for the tail. full: targets are
    a teacher's hidden states, so over the whole vocabulary.
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
        """Return the shape with rows rounded up as sequence parallelism needs."""
        step = layout.sequence_ranks
        return replace(self, rows=-(-self.rows // step) * step)


@dataclass(frozen=True)
class Repeated:
    """Number of micro-batches of one shape."""

    shape: PackedShape
    count: int
