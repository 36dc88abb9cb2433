"""Seconds of training and scoring by arithmetic, memory traffic and communication.

Matrix products and the kernels between them run one after another on one stream, so arithmetic and memory traffic are
summed, and so are the pipeline's bubble and fixed costs. Where the host needs longer to launch a micro-batch's kernels
than the GPU to run them, the difference is added. Communication is summed too, except what overlaps with
computation: over the replicas if the layout overlaps, and the ring of context parallelism under Transformer Engine. At
most OVERLAP_SHARE of the computation can hide it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_hdpo.costs.activations import layer_bytes
from megatron_hdpo.costs.cluster import (
    ATTENTION_EFFICIENCY,
    EXPERT_EFFICIENCY,
    EXPERT_IMBALANCE,
    FP8_MATMUL_EFFICIENCY,
    HBM_EFFICIENCY,
    HOST_ADAM_BYTES_S,
    HOST_LINK_BYTES_S,
    MATMUL_EFFICIENCY,
    OVERLAP_SHARE,
    Cluster,
    Gpu,
)
from megatron_hdpo.costs.collectives import Collective, gradient_collectives, scoring_collectives, step_collectives
from megatron_hdpo.costs.flops import (
    FORWARD_AND_BACKWARD,
    attention_flops,
    attention_product_flops,
    ffn_flops,
    forward_flops,
    head_flops,
)
from megatron_hdpo.costs.launches import micro_batch_launches
from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.costs.micro_batch_shape import PackedShape, Repeated
from megatron_hdpo.costs.parameters import stage_parameters
from megatron_hdpo.costs.schedule import bubble
from megatron_hdpo.costs.workload import Workload
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.planner.phase_time import MicroBatchTime, PhaseTime, nothing
from megatron_hdpo.types.learning import ModelRole

# Memory traffic of a layer without its matrix products. Forward, what it keeps is written and read once; backward, it
# is read once, and a gradient of its size is written and read.
_FORWARD_PASSES, _BACKWARD_PASSES = 2, 3
# A micro-batch's bf16 gradient is written and read, and the fp32 sum is read and written.
_GRADIENT_BYTES = 4 + 4 + 2 + 2
_PHASES: dict[ModelRole, str] = {"policy": "score", "teacher": "teacher", "reference": "reference"}
# Adam on the host reads main weight, two moments and gradient, and writes all but the gradient.
_HOST_ADAM_BYTES = 7 * 4


@dataclass(frozen=True)
class _Passes:
    """Arithmetic of the parts of a layer, in forward passes."""

    attention: float
    flash: float
    ffn: float


def _training_passes(layout: Layout) -> _Passes:
    """Return forward and backward passes; backward is twice the products, and 2.5 times flash attention."""
    again = int(layout.recompute)
    core = again or int("core_attn" in layout.recomputed)
    ffn = again or int("mlp" in layout.recomputed or "moe" in layout.recomputed)
    return _Passes(3 + again, 3.5 + core, 3 + ffn)


def _product_rate(layout: Layout, gpu: Gpu) -> float:
    """Return useful flops per second of the layers' products."""
    return gpu.fp8_flops_s * FP8_MATMUL_EFFICIENCY if layout.fp8 else gpu.flops_s * MATMUL_EFFICIENCY


def _flash_s(a: Architecture, layout: Layout, shape: PackedShape, passes: _Passes, gpu: Gpu) -> float:
    """Return the seconds of one layer's attention over a micro-batch on one rank."""
    flops = shape.rows * attention_flops(a, shape.length) / layout.tensor
    return passes.flash * flops / ATTENTION_EFFICIENCY / gpu.flops_s


def _layers_s(a: Architecture, layout: Layout, shape: PackedShape, passes: _Passes, gpu: Gpu) -> float:
    """Return the seconds of a stage's layers over a micro-batch on one rank."""
    rate = _product_rate(layout, gpu)
    products = passes.attention * shape.rows * attention_product_flops(a) / layout.tensor / rate
    if a.num_experts:  # every rank of a tensor-parallel group routes its own rows
        share = shape.rows / layout.sequence_ranks * EXPERT_IMBALANCE / EXPERT_EFFICIENCY
    else:
        share = shape.rows / layout.tensor
    products += passes.ffn * share * ffn_flops(a) / rate
    return a.num_layers / layout.pipeline * (products + _flash_s(a, layout, shape, passes, gpu))


def _head_s(a: Architecture, layout: Layout, shape: PackedShape, passes: int, gpu: Gpu) -> float:
    return passes * head_flops(a) / layout.tensor * shape.responses / MATMUL_EFFICIENCY / gpu.flops_s


@dataclass(frozen=True)
class _StageTimes:
    """Seconds of a stage, and the kernels that it launches per micro-batch.

    arithmetic, memory, inside (communication): per micro-batch. after (communication), update (optimizer), hidden
    (communication behind computation): per optimizer step.
    """

    arithmetic: float
    memory: float
    inside: float
    after: float
    update: float
    hidden: float
    launches: int

    @property
    def micro_batch(self) -> MicroBatchTime:
        return MicroBatchTime(self.arithmetic + self.memory + self.inside, self.launches)

    @property
    def per_batch(self) -> float:
        return self.micro_batch.time_s


@lru_cache(maxsize=64)  # a search repeats the call for every size of servers
def training(a: Architecture, layout: Layout, workload: Workload, cluster: Cluster) -> PhaseTime:
    """Return the time of all optimizer updates of a step: 1F1B over the micro-batches, reduction, optimizer."""
    work, updates = workload.training_work(layout), workload.updates
    stages = [
        _training_stage(a=a, layout=layout, stage=stage, work=work, workload=workload, cluster=cluster)
        for stage in layout.stages
    ]
    slowest = max(stages, key=lambda times: times.per_batch)
    one = [(workload.sequence_tokens, workload.response_tokens)]
    return PhaseTime(
        phase="training",
        arithmetic_s=updates * work.count * slowest.arithmetic,
        memory_s=updates * (work.count * slowest.memory + slowest.update),
        communication_s=updates * (work.count * slowest.inside + slowest.after),
        other_s=updates * bubble(layout) * slowest.per_batch,
        flops=FORWARD_AND_BACKWARD * workload.trained_sequences * forward_flops(a, one),
        tokens=workload.trained_sequences * workload.sequence_tokens,
        collectives=tuple(step_collectives(a, layout, 0, [work], workload.head_chunk)),
        hidden_s=updates * slowest.hidden,
        host_s=updates * work.count * slowest.micro_batch.waits_s,
        micro_batch=slowest.micro_batch,
    )


def _training_stage(
    a: Architecture, layout: Layout, stage: int, work: Repeated, workload: Workload, cluster: Cluster
) -> _StageTimes:
    shape, gpu, passes = work.shape.padded(layout), cluster.gpu, _training_passes(layout)
    hbm, again = gpu.hbm_bytes_s * HBM_EFFICIENCY, int(layout.recompute)
    arithmetic = _layers_s(a, layout, shape, passes, gpu)
    parameters = stage_parameters(a, layout, stage)
    traffic = _layer_traffic(a, layout, shape, _FORWARD_PASSES * (1 + again) + _BACKWARD_PASSES)
    traffic += parameters.values * ((2 + again) * layout.value_bytes + _GRADIENT_BYTES)
    if stage == layout.pipeline - 1:
        arithmetic += _head_s(a, layout, shape, 3, gpu)
        traffic += _head_traffic(a, layout, shape, workload.head_chunk)
    inside, beside = _inside_s(
        a=a, layout=layout, stage=stage, shape=shape, head_chunk=workload.head_chunk, cluster=cluster
    )
    after, hidden = _after_s(
        a=a, layout=layout, stage=stage, per_batch=arithmetic + traffic / hbm, updates=workload.updates, cluster=cluster
    )
    shard = parameters.shard_values(layout)
    # Zeroing and reading gradients; Adam reads and writes main weights and both moments, and writes the weights.
    update = parameters.values * 8.0 + shard * (1.0 - layout.offload) * (4 + 6 * 4 + layout.value_bytes)
    host = shard * layout.offload * (_HOST_ADAM_BYTES / HOST_ADAM_BYTES_S + (4 + 4) / HOST_LINK_BYTES_S)
    return _StageTimes(
        arithmetic=arithmetic,
        memory=traffic / hbm,
        inside=inside,
        after=after,
        update=update / hbm + host,
        hidden=hidden + work.count * beside,
        launches=micro_batch_launches(a, layout, stage, shape, workload.head_chunk, backward=True),
    )


def _layer_traffic(a: Architecture, layout: Layout, shape: PackedShape, passes: float) -> float:
    whole = layer_bytes(a, replace(layout, recomputed=()), shape)
    return passes * a.num_layers / layout.pipeline * whole


def _head_traffic(a: Architecture, layout: Layout, shape: PackedShape, head_chunk: int) -> float:
    """Return the bytes of logits and their gradient, in chunks; each chunk adds to the head's fp32 gradient."""
    width = a.padded_vocab_size(layout.tensor) / layout.tensor
    chunks = -(-shape.responses // head_chunk)
    return 6.0 * shape.responses * width * layout.value_bytes + (2 * chunks + 3) * width * a.hidden_size * 4.0


def _inside_s(
    a: Architecture, layout: Layout, stage: int, shape: PackedShape, head_chunk: int, cluster: Cluster
) -> tuple[float, float]:
    """Return a micro-batch's seconds of exposed communication, and those hidden behind its attention."""
    made = step_collectives(a, layout, stage, [Repeated(shape, 1)], head_chunk)
    after = _seconds(list(gradient_collectives(a, layout, stage)), layout, cluster)
    ring = _seconds([c for c in made if c.group == "cp"], layout, cluster)
    hidden = 0.0
    if layout.spec == "transformer_engine":
        attention = _flash_s(a, layout, shape, _training_passes(layout), cluster.gpu) * a.num_layers / layout.pipeline
        hidden = min(ring, OVERLAP_SHARE * attention)
    return _seconds(made, layout, cluster) - after - hidden, hidden


def _after_s(
    a: Architecture, layout: Layout, stage: int, per_batch: float, updates: int, cluster: Cluster
) -> tuple[float, float]:
    """Return an update's seconds of exposed communication, and those hidden.

    Gradients hide behind the last backward pass, weights behind the next update's first forward pass; the weights of
    the last update are exposed.
    """
    made = list(gradient_collectives(a, layout, stage))
    total = _seconds(made, layout, cluster)
    if not layout.overlap:
        return total, 0.0
    reduce = _seconds([c for c in made if c.kind == "reduce_scatter"], layout, cluster)
    gather = _seconds([c for c in made if c.kind == "all_gather"], layout, cluster) * (updates - 1) / updates
    hidden = min(reduce, OVERLAP_SHARE * per_batch * 2 / 3) + min(gather, OVERLAP_SHARE * per_batch / 3)
    return total - hidden, hidden


def _seconds(collectives: Sequence[Collective], layout: Layout, cluster: Cluster) -> float:
    return sum(collective.seconds(layout, cluster) for collective in collectives)


def _swaps(workload: Workload, weights: ModelRole) -> int:
    """Return how often a scoring moves a model's weights between host and device.

    The policy's to the host, the other model's to the device, the policy's back; an external teacher's only to the
    device, because the policy stays.
    """
    if weights == "policy" or (weights == "teacher" and workload.teacher == "policy"):
        return 0
    return 1 if weights == "teacher" and workload.teacher == "external" else 3


@lru_cache(maxsize=256)
def scoring(a: Architecture, layout: Layout, workload: Workload, weights: ModelRole, cluster: Cluster) -> PhaseTime:
    """Return the time of a model's forward passes, and of moving its weights from the host."""
    phase, work = _PHASES[weights], workload.scoring_work(weights, layout)
    if not work.count:
        return nothing(phase)
    a = workload.scorer(weights, a)
    shape, gpu, last = work.shape.padded(layout), cluster.gpu, layout.pipeline - 1
    arithmetic = _layers_s(a, layout, shape, _Passes(1, 1, 1), gpu) + _head_s(a, layout, shape, 1, gpu)
    values = max(stage_parameters(a, layout, stage).values for stage in layout.stages)
    traffic = _layer_traffic(a, layout, shape, _FORWARD_PASSES) + values * layout.value_bytes
    traffic += 4.0 * shape.responses * a.padded_vocab_size(layout.tensor) / layout.tensor * layout.value_bytes
    memory = traffic / (gpu.hbm_bytes_s * HBM_EFFICIENCY)
    collectives = scoring_collectives(a, layout, last, [work], workload.head_chunk)
    communication = _seconds(collectives, layout, cluster)
    launches = micro_batch_launches(a, layout, last, shape, workload.head_chunk, backward=False)
    one = MicroBatchTime(arithmetic + memory + communication / work.count, launches)
    moved = values * layout.value_bytes * _swaps(workload, weights)
    sequences, prompt = workload.scored(weights)
    length = prompt + workload.response_tokens
    return PhaseTime(
        phase=phase,
        arithmetic_s=work.count * arithmetic,
        memory_s=work.count * memory,
        communication_s=communication,
        other_s=bubble(layout) * one.time_s + moved / HOST_LINK_BYTES_S,
        flops=sequences * forward_flops(a, [(length, workload.response_tokens)]),
        tokens=sequences * length,
        collectives=tuple(collectives),
        host_s=work.count * one.waits_s,
        micro_batch=one,
    )
