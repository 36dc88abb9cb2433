"""Bytes that optimizer steps send between ranks, by kind of collective and group.

They are computed, not observed: the arithmetic of `costs` is applied to the micro-batches that are run. That costs
nothing, while watching every operator from Python (a TorchDispatchMode) would cost microseconds for each of a step's
hundred thousands. The planner's tests compare the arithmetic with recorded collectives, to the byte; a profiled step's
trace shows the collectives themselves. Not included: forward passes that only score, weights on their way to the
engine, and objects between hosts. With experts, a balanced router is assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_hdpo.costs.collectives import step_collectives
from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.costs.micro_batch_shape import PackedShape, Repeated
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.micro_batch import MicroBatchShape
from megatron_hdpo.types.learning import LossSpec


class TrainingTraffic:
    """Counter of the bytes that one rank's optimizer steps send; the callback for `Policy.on_training`."""

    def __init__(self, architecture: Architecture, layout: Layout, stage: int, head_chunk: int) -> None:
        self.architecture, self.layout, self.stage, self.head_chunk = architecture, layout, stage, head_chunk
        self._bytes: Counter[str] = Counter()

    def __call__(self, micro_batches: Sequence[MicroBatchShape], spec: LossSpec) -> None:
        """Count an optimizer step of these micro-batches."""
        shapes = [Repeated(packed_shape(one, spec), 1) for one in micro_batches]
        for made in step_collectives(self.architecture, self.layout, self.stage, shapes, self.head_chunk):
            if made.group != "host" and self.layout.ranks(made.group) > 1:
                self._bytes[f"comm/{made.kind}_{made.group}_bytes"] += round(made.bytes * made.count)

    def take(self) -> dict[str, int]:
        """Return metric name -> bytes since the last call; of each collective the larger side on this rank."""
        taken = dict(self._bytes)
        self._bytes.clear()
        return taken


def packed_shape(own: MicroBatchShape, spec: LossSpec) -> PackedShape:
    """Return the micro-batch's shape as the arithmetic needs it."""
    distill = spec.distill
    return PackedShape(
        rows=own.rows,
        length=own.longest,
        responses=own.responses,
        targets=own.targets,
        top_k=own.top_k,
        two_temperatures=distill is not None and distill.temperature != spec.temperature,
        bucket=distill is not None and distill.tail == "bucket",
        full=own.full,
    )
