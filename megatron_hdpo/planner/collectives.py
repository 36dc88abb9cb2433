"""Every collective of an optimizer step, as one rank sees it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.planner.cluster import Cluster
from megatron_hdpo.planner.layout import Layout
from megatron_hdpo.planner.parameters import head_values, norm_values, stage_parameters
from megatron_hdpo.planner.shape_of_work import PackedShape, Repeated

_FP32 = 4
# model/step_metrics.py in float64: the two normalisers; thirteen sums and the tokens; one maximum.
_METRIC_BYTES = (16, 112, 8)
# Megatron tells the next stage the shape of what it sends: three int64.
_SHAPE_BYTES = 24


@dataclass(frozen=True)
class Collective:
    """`count` equal calls. bytes: of one call, the larger side on one rank (what an all-gather gives, a reduce-scatter
    takes). what: why it is made."""

    kind: str
    group: str
    bytes: float
    count: int
    what: str

    def seconds(self, layout: Layout, cluster: Cluster) -> float:
        """On NCCL's rings. Host collectives are not on the GPU's links and take none."""
        if self.group == "host":
            return 0.0
        ranks = ranks_of(self.group, layout)
        bandwidth, hop = cluster.link(layout.span(self.group))
        if self.kind in ("send", "recv"):
            return self.count * (hop + self.bytes / bandwidth) / 2  # each message is counted on both of its ends
        rounds = (2 if self.kind == "all_reduce" else 1) * (ranks - 1)
        return self.count * rounds * (hop + self.bytes / ranks / bandwidth)


def ranks_of(group: str, layout: Layout) -> int:
    """Members of a group."""
    sizes = {"tp": layout.tensor, "pp": layout.pipeline, "dp_cp": layout.data, "embd": min(2, layout.pipeline)}
    return sizes.get(group, layout.world)


def step_collectives(
    architecture: Architecture, layout: Layout, stage: int, work: Sequence[Repeated], head_chunk: int
) -> list[Collective]:
    """Those of one optimizer step (`Policy.update`) on a rank of a stage; `work`: its replica's micro-batches."""
    made: list[Collective] = []
    for repeated in work:
        shape = repeated.shape.padded(layout)
        once = [
            *_layers(architecture, layout, stage, shape, backward=True),
            *_head(architecture, layout, stage, shape, head_chunk),
            *_pipeline(architecture, layout, stage, shape, backward=True),
        ]
        made += [_times(collective, repeated.count) for collective in once]
    made += _gradients(architecture, layout, stage)
    return [*made, *_host(layout, sum(repeated.count for repeated in work))]


def scoring_collectives(
    architecture: Architecture, layout: Layout, stage: int, work: Sequence[Repeated], head_chunk: int
) -> list[Collective]:
    """Those of one scoring with the shapes' top k (`Policy.score`), those on the host left out."""
    made: list[Collective] = []
    for repeated in work:
        shape = repeated.shape.padded(layout)
        once = [
            *_layers(architecture, layout, stage, shape, backward=False),
            *_pipeline(architecture, layout, stage, shape, backward=False),
        ]
        if layout.tensor > 1 and stage == layout.pipeline - 1:
            chunks = max(1, -(-shape.responses // head_chunk))
            rows = shape.responses / chunks
            once.append(Collective("all_reduce", "tp", 4 * rows * _FP32 / 2, 2 * chunks, "head statistics"))
            packed = layout.tensor * rows * (2 * shape.top_k + 2) * _FP32
            once += [Collective("all_gather", "tp", packed, chunks, "top k")] if shape.top_k else []
        made += [_times(collective, repeated.count) for collective in once]
    return made


def _times(collective: Collective, count: int) -> Collective:
    return Collective(collective.kind, collective.group, collective.bytes, collective.count * count, collective.what)


def _layers(a: Architecture, layout: Layout, stage: int, shape: PackedShape, *, backward: bool) -> Iterator[Collective]:
    """Of attention and FFN, of the embedding, and of the gather before the head; forward, and backward too."""
    if layout.tensor == 1:
        return
    layers, whole = a.num_layers // layout.pipeline, shape.rows * a.hidden_size * layout.value_bytes
    first, last = int(stage == 0), int(stage == layout.pipeline - 1)
    passes = (2 if layout.recompute else 1) if backward else 1
    if not layout.sequence:
        count = 2 * layers * (passes + int(backward)) + first
        yield Collective("all_reduce", "tp", whole, count, "layers")
        return
    # Forward: gather before QKV and FC1, scatter after the others. Backward: gather the gradients behind those, and the
    # inputs of QKV and FC1 once more for their weights' gradients; scatter the gradients before these.
    gathers = layers * (2 * passes + 4 * int(backward)) + last + first * int(backward)
    yield Collective("all_gather", "tp", whole, gathers, "layers")
    yield Collective("reduce_scatter", "tp", whole, layers * (2 * passes + 2 * int(backward)) + first, "layers")


def _head(a: Architecture, layout: Layout, stage: int, shape: PackedShape, chunk: int) -> Iterator[Collective]:
    """Two all-reduces per chunk of rows, and one of the hidden states' gradient."""
    if layout.tensor == 1 or stage < layout.pipeline - 1:
        return
    chunks = max(1, -(-shape.responses // chunk))
    sums = (3 + int(shape.two_temperatures and shape.targets > 0)) * shape.responses
    sums += shape.targets * (1 if shape.full else shape.top_k + int(shape.bucket))
    maxima = shape.responses + shape.targets * int(shape.full)
    yield Collective("all_reduce", "tp", maxima * _FP32 / chunks, chunks, "head maxima")
    yield Collective("all_reduce", "tp", sums * _FP32 / chunks, chunks, "head sums")
    if shape.full and shape.targets:  # divergence/dense_pass.py: six sums per target
        yield Collective("all_reduce", "tp", 6 * shape.targets * _FP32 / chunks, chunks, "divergence sums")
    yield Collective("all_reduce", "tp", shape.responses * a.hidden_size * layout.value_bytes, 1, "head gradient")


def _pipeline(
    a: Architecture, layout: Layout, stage: int, shape: PackedShape, *, backward: bool
) -> Iterator[Collective]:
    behind, ahead = int(stage > 0), int(stage < layout.pipeline - 1)
    hidden = shape.rows // layout.sequence_ranks * a.hidden_size * layout.value_bytes
    sent, received = ahead + behind * int(backward), behind + ahead * int(backward)
    for size, what in ((_SHAPE_BYTES, "shapes"), (hidden, "activations")):
        if sent:
            yield Collective("send", "pp", size, sent, what)
        if received:
            yield Collective("recv", "pp", size, received, what)


def _gradients(a: Architecture, layout: Layout, stage: int) -> Iterator[Collective]:
    """After the last backward pass: gradients to the shards, copies made equal, the norm, and weights back."""
    for values in stage_parameters(a, layout, stage).bucket_values(layout.data):
        yield Collective("reduce_scatter", "dp_cp", values * _FP32, 1, "gradients")
        yield Collective("all_gather", "dp_cp", values * layout.value_bytes, 1, "weights")
    norms = norm_values(a, layout, stage)
    if layout.tensor > 1 and norms:
        yield Collective("all_reduce", "tp", norms * _FP32, 1, "gradients of norms")
    ends = stage in (0, layout.pipeline - 1)
    if a.tied and layout.pipeline > 1 and ends:
        yield Collective("all_reduce", "embd", head_values(a, layout.tensor) * _FP32, 1, "gradients of the embedding")
    yield Collective("all_reduce", "intra_dist_opt", _FP32, 1, "gradient norm")


def _host(layout: Layout, micro_batches: int) -> Iterator[Collective]:
    """The number of micro-batches (a pickled int and its length) and the metrics, over all ranks on gloo."""
    yield Collective("all_gather", "host", layout.world * 8, 1, "number of micro-batches")
    pickled = len(pickle.dumps(micro_batches))
    yield Collective("all_gather", "host", layout.world * pickled, 1, "number of micro-batches")
    for size in _METRIC_BYTES:
        yield Collective("all_reduce", "host", size, 1, "metrics")
