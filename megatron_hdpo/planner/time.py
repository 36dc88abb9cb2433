"""Seconds of each phase of a step by arithmetic, memory traffic and communication.

`bound_s` is the roofline: the largest of the three, as if they overlapped perfectly. `time_s` is what is planned with.
In training and scoring, matrix products and the kernels between them follow each other on one stream, and the trainer
overlaps no communication: the three add up, and so do the pipeline's bubble and fixed costs. In decoding one and the
same kernel streams the weights and computes: there arithmetic and memory traffic overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.planner.activations import layer_bytes
from megatron_hdpo.planner.cluster import (
    ATTENTION_EFFICIENCY,
    BROADCAST_SYNC_BYTES_S,
    DECODE_MATMUL_EFFICIENCY,
    EMBEDDED_LAYER_STEP_S,
    HBM_EFFICIENCY,
    HOST_LINK_BYTES_S,
    MATMUL_EFFICIENCY,
    SERVER_STEP_S,
    SHARED_SYNC_BYTES_S,
    Cluster,
)
from megatron_hdpo.planner.collectives import Collective, scoring_collectives, step_collectives
from megatron_hdpo.planner.layout import Layout
from megatron_hdpo.planner.memory import cache_bytes_per_token
from megatron_hdpo.planner.parameters import layer_matrices, model_values, stage_parameters
from megatron_hdpo.planner.shape_of_work import PackedShape, Repeated
from megatron_hdpo.planner.workload import Rollouts, Workload

# Traffic of a layer beside its matrix products: what it keeps is written once and read once forward, and read once
# backward, where a gradient of its size is written and read.
_FORWARD_PASSES, _BACKWARD_PASSES = 2, 3
# fp32 gradients are read and written when a micro-batch's bf16 gradient (written, read) is added.
_GRADIENT_BYTES = 4 + 4 + 2 + 2


@dataclass(frozen=True)
class PhaseTime:
    """Seconds on the busiest GPU. flops: useful ones of the whole phase over all GPUs (nothing recomputed).

    other_s: bubble of the pipeline, host transfers, fixed costs. tokens: sampled, scored or trained, over all GPUs.
    streams: one kernel computes while it reads, so arithmetic and memory traffic overlap.
    """

    phase: str
    arithmetic_s: float
    memory_s: float
    communication_s: float
    other_s: float
    flops: float
    tokens: float
    collectives: tuple[Collective, ...] = ()
    streams: bool = False

    @property
    def bound_s(self) -> float:
        """The roofline: the largest of arithmetic, memory traffic and communication."""
        return max(self.arithmetic_s, self.memory_s, self.communication_s)

    @property
    def time_s(self) -> float:
        """What is planned with."""
        return _joined(self.arithmetic_s, self.memory_s, self.streams) + self.communication_s + self.other_s

    def mfu(self, cluster: Cluster, gpus: int) -> float:
        """Useful arithmetic over what `gpus` could have done."""
        return self.flops / (self.time_s * gpus * cluster.gpu.flops_s) if self.time_s else 0.0


def _joined(arithmetic_s: float, memory_s: float, streams: bool) -> float:
    return max(arithmetic_s, memory_s) if streams else arithmetic_s + memory_s


def product_flops(architecture: Architecture, tensor: int) -> float:
    """Of one layer's matrix products per token, forward, on one rank."""
    return 2.0 * sum(layer_matrices(architecture, tensor))


def attention_flops(architecture: Architecture, tensor: int, length: float) -> float:
    """Of one layer's causal attention per token, forward, on one rank: half of 4 x width x length."""
    return 2.0 * architecture.num_heads * architecture.head_dim / tensor * length


def head_flops(architecture: Architecture, tensor: int) -> float:
    """Of the head per response row, forward, on one rank."""
    return 2.0 * architecture.hidden_size * architecture.padded_vocab_size(tensor) / tensor


def _layers_s(a: Architecture, layout: Layout, shape: PackedShape, peak: float, products: float, flash: float) -> float:
    """A stage's layers over a micro-batch: `products` and `flash` forward passes' worth of arithmetic."""
    layers = a.num_layers / layout.pipeline
    matmul = products * product_flops(a, layout.tensor) / MATMUL_EFFICIENCY
    attention = flash * attention_flops(a, layout.tensor, shape.length) / ATTENTION_EFFICIENCY
    return layers * shape.rows * (matmul + attention) / peak


def _model_flops(a: Architecture, shape: PackedShape, passes: int) -> float:
    """Useful flops of one micro-batch through the whole model. passes: 1 forward, 3 with backward."""
    layer = product_flops(a, 1) + attention_flops(a, 1, shape.length)
    head = 2.0 * a.hidden_size * a.vocab_size * shape.responses
    return passes * (a.num_layers * layer * shape.rows + head)


def training(a: Architecture, layout: Layout, workload: Workload, cluster: Cluster) -> PhaseTime:
    """All optimizer steps of a step: 1F1B over the micro-batches, reduction, optimizer."""
    work = workload.training_work(layout.data)
    stages = [_training_stage(a, layout, stage, work, workload, cluster) for stage in layout.stages]
    slowest = max(stages, key=lambda times: sum(times[:3]))
    arithmetic, memory, inside, after, update = slowest
    per_batch = arithmetic + memory + inside
    collectives = step_collectives(a, layout, 0, [work], workload.head_chunk)
    return PhaseTime(
        "training",
        workload.updates * work.count * arithmetic,
        workload.updates * (work.count * memory + update),
        workload.updates * (work.count * inside + after),
        workload.updates * (layout.pipeline - 1) * per_batch,
        workload.updates * layout.data * work.count * _model_flops(a, work.shape, 3),
        workload.updates * layout.data * work.count * float(work.shape.rows),
        tuple(collectives),
    )


def _training_stage(
    a: Architecture, layout: Layout, stage: int, work: Repeated, workload: Workload, cluster: Cluster
) -> tuple[float, float, float, float, float]:
    """Per micro-batch arithmetic, memory traffic and communication; per step communication and optimizer traffic."""
    shape, gpu = work.shape.padded(layout), cluster.gpu
    hbm = gpu.hbm_bytes_s * HBM_EFFICIENCY
    again = int(layout.recompute)
    # Backward: products twice; flash attention 2.5 times, for it makes the scores once more.
    arithmetic = _layers_s(a, layout, shape, gpu.flops_s, 3 + again, 3.5 + again)
    kept = a.num_layers / layout.pipeline * layer_bytes(a, layout, shape.rows)
    parameters = stage_parameters(a, layout, stage)
    traffic = kept * (_FORWARD_PASSES * (1 + again) + _BACKWARD_PASSES)
    traffic += parameters.values * ((2 + again) * layout.value_bytes + _GRADIENT_BYTES)
    if stage == layout.pipeline - 1:
        arithmetic += 3 * head_flops(a, layout.tensor) * shape.responses / MATMUL_EFFICIENCY / gpu.flops_s
        width = a.padded_vocab_size(layout.tensor) / layout.tensor
        traffic += 6.0 * shape.responses * width * layout.value_bytes  # logits and their gradient, in chunks
        chunks = -(-shape.responses // workload.head_chunk)
        traffic += (2 * chunks + 3) * width * a.hidden_size * 4.0  # the head's fp32 gradient is added to per chunk
    after_s = _seconds(step_collectives(a, layout, stage, [], workload.head_chunk), layout, cluster)
    one = step_collectives(a, layout, stage, [Repeated(shape, 1)], workload.head_chunk)
    inside = _seconds(one, layout, cluster) - after_s
    shard = parameters.values / layout.data
    # Zeroing and reading gradients; Adam reads and writes main weights and both moments, and writes the weights.
    update = parameters.values * 8.0 + shard * (4 + 6 * 4 + layout.value_bytes)
    return arithmetic, traffic / hbm, inside, after_s, update / hbm


def _seconds(collectives: Sequence[Collective], layout: Layout, cluster: Cluster) -> float:
    return sum(collective.seconds(layout, cluster) for collective in collectives)


def teacher(a: Architecture, layout: Layout, workload: Workload, cluster: Cluster) -> PhaseTime:
    """The trainer's forward passes over privileged rollouts, and the swap of weights of a teacher on the host."""
    work = workload.teacher_work(layout.data)
    if not work.count:
        return PhaseTime("teacher", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    shape, gpu, last = work.shape.padded(layout), cluster.gpu, layout.pipeline - 1
    head = head_flops(a, layout.tensor) * shape.responses / MATMUL_EFFICIENCY / gpu.flops_s
    arithmetic = _layers_s(a, layout, shape, gpu.flops_s, 1, 1) + head
    values = max(stage_parameters(a, layout, stage).values for stage in layout.stages)
    traffic = a.num_layers / layout.pipeline * layer_bytes(a, layout, shape.rows) * _FORWARD_PASSES
    traffic += values * layout.value_bytes
    traffic += 4.0 * shape.responses * a.padded_vocab_size(layout.tensor) / layout.tensor * layout.value_bytes
    memory = traffic / (gpu.hbm_bytes_s * HBM_EFFICIENCY)
    collectives = scoring_collectives(a, layout, last, [work], workload.head_chunk)
    communication = _seconds(collectives, layout, cluster)
    per_batch = arithmetic + memory + communication / work.count
    # The policy's weights go to the host, the teacher's come, the policy's come back.
    moved = 3.0 * values * layout.value_bytes if workload.teacher in ("frozen", "snapshot", "ema") else 0.0
    return PhaseTime(
        "teacher",
        work.count * arithmetic,
        work.count * memory,
        communication,
        last * per_batch + moved / HOST_LINK_BYTES_S,
        layout.data * work.count * _model_flops(a, work.shape, 1),
        layout.data * work.count * float(work.shape.rows),
        tuple(collectives),
    )


@dataclass(frozen=True)
class Batch:
    """What one engine decodes: sequences in all, at once, and their prompts."""

    sequences: float
    at_once: float
    prompts: float
    prompt_tokens: int


def sampling(
    a: Architecture, phase: str, batch: Batch, engines: int, workload: Workload, rollouts: Rollouts, cluster: Cluster
) -> PhaseTime:
    """Prefill of every prompt once per engine, then decoding; no faster than the longest response alone."""
    if not batch.sequences:
        return PhaseTime(phase, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    gpu, tensor, values = cluster.gpu, rollouts.tensor, model_values(a)
    tokens = batch.sequences * workload.response_tokens
    steps = max(tokens / batch.at_once, float(workload.longest_response))
    context = batch.prompt_tokens + workload.response_tokens / 2
    dense = 2.0 * (values - (0 if a.tied else a.vocab_size * a.hidden_size))
    attention = 2 * attention_flops(a, 1, context) * a.num_layers  # not half: a new token sees all
    prefill = batch.prompts * batch.prompt_tokens
    attend_prompt = attention_flops(a, 1, batch.prompt_tokens) * a.num_layers
    compute = tokens * (dense / DECODE_MATMUL_EFFICIENCY + attention / ATTENTION_EFFICIENCY)
    compute += prefill * (dense / MATMUL_EFFICIENCY + attend_prompt / ATTENTION_EFFICIENCY)
    traffic = steps * 2.0 * values / tensor + tokens * context * cache_bytes_per_token(a, tensor)
    per_step = SERVER_STEP_S if rollouts.engine != "embedded" else EMBEDDED_LAYER_STEP_S * a.num_layers
    flops = engines * (tokens * (dense + attention) + prefill * (dense + attend_prompt))
    return PhaseTime(
        phase,
        compute / tensor / gpu.flops_s,
        traffic / (gpu.hbm_bytes_s * HBM_EFFICIENCY),
        _decode_communication(a, tensor, tokens + prefill, steps, cluster),
        steps * per_step,
        flops,
        engines * tokens,
        streams=True,
    )


def _decode_communication(a: Architecture, tensor: int, tokens: float, steps: float, cluster: Cluster) -> float:
    """Two all-reduces per layer and step over a server's GPUs."""
    if tensor == 1:
        return 0.0
    bandwidth, hop = cluster.link(tensor)
    sent = 2.0 * (tensor - 1) / tensor * tokens * a.hidden_size * 2
    return 2.0 * a.num_layers * (steps * 2 * (tensor - 1) * hop + sent / bandwidth)


def sync(a: Architecture, layout: Layout, rollouts: Rollouts, cluster: Cluster) -> PhaseTime:
    """Weights to the engine: shards over the pipeline, joined over tensor-parallel ranks, handed over."""
    size = 2.0 * model_values(a)
    pipeline_bandwidth, _ = cluster.link(layout.world)
    tensor_bandwidth, _ = cluster.link(layout.tensor)
    gather = size / layout.tensor / pipeline_bandwidth if layout.pipeline > 1 else 0.0
    gather += size * (layout.tensor - 1) / layout.tensor / tensor_bandwidth
    rates = {"separate": BROADCAST_SYNC_BYTES_S, "colocated": SHARED_SYNC_BYTES_S}
    handed = size / rates[rollouts.engine] if rollouts.engine in rates else 0.0
    traffic = 4.0 * size / (cluster.gpu.hbm_bytes_s * HBM_EFFICIENCY)  # copied twice, read and written
    return PhaseTime("sync", 0.0, traffic, gather, handed, 0.0, 0.0)
