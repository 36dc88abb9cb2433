"""Collectives of an optimizer step: kind, group, bytes and number on one rank."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_hdpo.costs.cluster import Cluster
from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.costs.micro_batch_shape import PackedShape, Repeated
from megatron_hdpo.costs.parameters import head_values, norm_values, stage_parameters
from megatron_hdpo.costs.schedule import messages
from megatron_hdpo.model.architecture import Architecture

_FP32 = 4
_INT64 = 8
# model/step_metrics.py in float64: the two normalisers; thirteen sums and the tokens; one maximum.
_METRIC_BYTES = (16, 136, 8)


@dataclass(frozen=True)
class Collective:
    """Group of `count` equal calls.

    bytes: of one call, the larger side on one rank (the output of an all-gather, the input of a reduce-scatter); of an
    all-to-all what a rank sends, its own part included, with a balanced router. what: purpose.
    """

    kind: str
    group: str
    bytes: float
    count: int
    what: str

    def seconds(self, layout: Layout, cluster: Cluster) -> float:
        """Return the seconds of all calls.

        NCCL's rings; an all-to-all is pairs of ranks, and pairs within a node use its links. Collectives on the host do
        not use the GPU's links and count 0.
        """
        if self.group == "host":
            return 0.0
        ranks = layout.ranks(self.group)
        bandwidth, hop = cluster.link(layout.span(self.group))
        if self.kind in ("send", "recv"):
            return self.count * (hop + self.bytes / bandwidth) / 2  # each message is counted on both of its ends
        if self.kind == "all_to_all":
            near = min(1.0, cluster.gpus_per_node / layout.span(self.group))
            sent = near / cluster.link(1)[0] + (1.0 - near) / bandwidth
            return self.count * ((ranks - 1) * hop + self.bytes * sent)
        rounds = (2 if self.kind == "all_reduce" else 1) * (ranks - 1)
        return self.count * rounds * (hop + self.bytes / ranks / bandwidth)


def step_collectives(
    architecture: Architecture, layout: Layout, stage: int, work: Sequence[Repeated], head_chunk: int
) -> list[Collective]:
    """Return the collectives of one optimizer step (`Policy.update`) on a rank of a stage. work: micro-batches."""
    made: list[Collective] = []
    for repeated in work:
        shape = repeated.shape.padded(layout)
        once = [
            *_layers(architecture, layout, stage, shape, backward=True),
            *_head(architecture, layout, stage, shape, head_chunk),
            *_pipeline(architecture, layout, stage, shape, backward=True),
        ]
        made += [_times(collective, repeated.count) for collective in once]
    made += gradient_collectives(architecture, layout, stage)
    return [*made, *_host(architecture, layout, sum(repeated.count for repeated in work))]


def scoring_collectives(
    architecture: Architecture, layout: Layout, stage: int, work: Sequence[Repeated], head_chunk: int
) -> list[Collective]:
    """Return the collectives of one scoring (`Policy.score`) with the shapes' top k, without those on the host."""
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
    return replace(collective, count=collective.count * count)


def _passes(layout: Layout, module: str, backward: bool) -> int:
    """Return the number of forward passes of a part of the layers, recomputation included."""
    return 2 if backward and (layout.recompute or module in layout.recomputed) else 1


def _layers(a: Architecture, layout: Layout, stage: int, shape: PackedShape, *, backward: bool) -> Iterator[Collective]:
    """Yield the collectives of the layers, of the embedding, and of the gather before the head."""
    layers, whole = a.num_layers // layout.pipeline, shape.rows * a.hidden_size * layout.value_bytes
    first, last = int(stage == 0), int(stage == layout.pipeline - 1)
    if layout.tensor > 1 and layout.sequence:
        yield from _sequence_parallel(
            a=a, layout=layout, whole=whole, layers=layers, first=first, last=last, backward=backward
        )
    elif layout.tensor > 1:
        count = first + sum(layers * (_passes(layout, part, backward) + int(backward)) for part in ("attention", "mlp"))
        yield Collective("all_reduce", "tp", whole, count, "layers")
    if layout.context > 1:
        yield from _context(a, layout, shape, layers, backward)
    if a.num_experts and layout.ranks("tp_ep") > 1:
        yield from _experts(a, layout, shape, layers, backward)


def _sequence_parallel(
    a: Architecture, layout: Layout, whole: int, layers: int, first: int, last: int, backward: bool
) -> Iterator[Collective]:
    """Yield the collectives of sequence parallelism.

    | product | forward | backward |
    |---|---|---|
    | QKV, FC1 | gather the input | gather the input again (weight gradient), scatter the input's gradient |
    | projection, FC2 | scatter the output | gather the output's gradient |

    Experts gather nothing: each rank routes its own rows.
    """
    parts = ["attention"] if a.num_experts else ["attention", "mlp"]
    gathers, scatters = last + first * int(backward), first
    for part in parts:
        passes = _passes(layout, part, backward)
        gathers += layers * (passes + 2 * int(backward))
        scatters += layers * (passes + int(backward))
    yield Collective("all_gather", "tp", whole, gathers, "layers")
    yield Collective("reduce_scatter", "tp", whole, scatters, "layers")


def _context(a: Architecture, layout: Layout, shape: PackedShape, layers: int, backward: bool) -> Iterator[Collective]:
    """Yield the gathers of keys and values, and in the backward pass the reduce-scatters of their gradients.

    Transformer Engine passes them round a ring, with the same bytes, and again in the backward pass.
    """
    width = 2 * a.num_kv_heads * a.head_dim // layout.tensor
    whole = shape.rows * layout.context * width * layout.value_bytes
    gathers = _passes(layout, "core_attn", backward)
    gathers += int(backward and layout.spec == "transformer_engine")
    yield Collective("all_gather", "cp", whole, layers * gathers, "keys and values")
    if backward:
        yield Collective("reduce_scatter", "cp", whole, layers, "gradients of keys and values")


def _experts(a: Architecture, layout: Layout, shape: PackedShape, layers: int, backward: bool) -> Iterator[Collective]:
    """Yield the collectives of experts: counts of tokens, tokens and weights to the experts, results back.

    The backward pass repeats those of tokens and weights.
    """
    own = shape.rows // layout.sequence_ranks
    passes = _passes(layout, "moe", backward)
    counts = layout.ranks("tp_ep") * a.num_experts * _INT64
    yield Collective("all_gather", "tp_ep", counts, layers * passes, "tokens per expert")
    both = layers * (passes + int(backward))
    places = own * a.experts_per_token
    if layout.expert > 1:
        yield Collective("all_to_all", "ep", places * a.hidden_size * layout.value_bytes, 2 * both, "tokens to experts")
        yield Collective("all_to_all", "ep", places * _FP32, both, "weights of experts")
    if layout.expert_tensor > 1:
        yield from _expert_tensor(
            a=a, layout=layout, places=places * layout.expert_tensor, layers=layers, passes=passes, backward=backward
        )


def _expert_tensor(
    a: Architecture, layout: Layout, places: int, layers: int, passes: int, backward: bool
) -> Iterator[Collective]:
    """Yield the collectives of expert tensor parallelism.

    Forward: gather tokens and weights before an expert's shards, reduce-scatter the results in fp32. Backward:
    reversed.
    """
    rows, weights = places * a.hidden_size, places * _FP32
    yield Collective("all_gather", "expt_tp", rows * layout.value_bytes, layers * passes, "tokens to experts")
    yield Collective("all_gather", "expt_tp", weights, layers * passes, "weights of experts")
    yield Collective("reduce_scatter", "expt_tp", rows * _FP32, layers * passes, "tokens to experts")
    if backward:
        yield Collective("all_gather", "expt_tp", rows * _FP32, layers, "tokens to experts")
        yield Collective("reduce_scatter", "expt_tp", rows * layout.value_bytes, layers, "tokens to experts")
        yield Collective("reduce_scatter", "expt_tp", weights, layers, "weights of experts")


def _head(a: Architecture, layout: Layout, stage: int, shape: PackedShape, chunk: int) -> Iterator[Collective]:
    """Yield the head's collectives: two all-reduces per chunk of rows, and one of the hidden states' gradient."""
    if layout.tensor == 1 or stage < layout.pipeline - 1:
        return
    chunks = max(1, -(-shape.responses // chunk))
    sums = (3 + int((shape.two_temperatures or shape.full) and shape.targets > 0)) * shape.responses
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
    if layout.pipeline == 1:
        return
    ahead, behind = messages(layout, stage)
    hidden = shape.rows // layout.sequence_ranks * a.hidden_size * layout.value_bytes
    sent, received = ahead + behind * int(backward), behind + ahead * int(backward)
    if sent:
        yield Collective("send", "pp", hidden, sent, "activations")
    if received:
        yield Collective("recv", "pp", hidden, received, "activations")


def gradient_collectives(a: Architecture, layout: Layout, stage: int) -> Iterator[Collective]:
    """Yield the collectives after the last backward pass.

    Reduce-scatter of gradients, all-reduce of copied parameters' gradients and of the norm, all-gather of weights.
    Experts with data-parallel groups of their own have a second optimizer; without overlap each of the two gathers all
    weights.
    """
    gathers = 2 if a.num_experts and layout.experts_apart and not layout.overlap else 1
    for buffer in stage_parameters(a, layout, stage).buffers:
        what = "gradients" if buffer.group == "dp_cp" else "gradients of experts"
        for values in buffer.bucket_values(layout):
            yield Collective("reduce_scatter", buffer.group, values * _FP32, 1, what)
            yield Collective("all_gather", buffer.group, values * layout.value_bytes, gathers, "weights")
    norms = norm_values(a, layout, stage)
    if layout.tensor > 1 and norms:
        yield Collective("all_reduce", "tp", norms * _FP32, 1, "gradients of norms")
    ends = stage in (0, layout.pipeline - 1)
    if a.tied and layout.pipeline > 1 and ends:
        yield Collective("all_reduce", "embd", head_values(a, layout.tensor) * _FP32, 1, "gradients of the embedding")
    yield Collective("all_reduce", "intra_dist_opt", _FP32, 1, "gradient norm")


def _host(a: Architecture, layout: Layout, micro_batches: int) -> Iterator[Collective]:
    """Yield the collectives of all ranks on gloo.

    The number of micro-batches (a pickled int and its length), the metrics, and the load of every expert of every
    layer.
    """
    yield Collective("all_gather", "host", layout.world * 8, 1, "number of micro-batches")
    pickled = len(pickle.dumps(micro_batches))
    yield Collective("all_gather", "host", layout.world * pickled, 1, "number of micro-batches")
    for size in _METRIC_BYTES:
        yield Collective("all_reduce", "host", size, 1, "metrics")
    if a.num_experts:
        yield Collective("all_reduce", "host", a.num_layers * a.num_experts * 8, 1, "load of experts")
