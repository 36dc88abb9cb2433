"""Seconds of sampling, and of sending weights to the engine."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hdpo.costs.cluster import (
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
from megatron_hdpo.costs.flops import attention_flops, decoding_flops, forward_flops
from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.costs.memory import cache_bytes_per_token, moved_bytes
from megatron_hdpo.costs.parameters import expert_matrices, model_values, served_bytes, visited_values
from megatron_hdpo.costs.workload import RolloutSetup, Workload
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.planner.phase_time import PhaseTime, nothing


@dataclass(frozen=True)
class Batch:
    """Work of one engine: sequences in total and at once, and their prompts."""

    sequences: float
    at_once: float
    prompts: float
    prompt_tokens: int


def sampling(
    a: Architecture,
    phase: str,
    batch: Batch,
    engines: int,
    workload: Workload,
    rollouts: RolloutSetup,
    cluster: Cluster,
) -> PhaseTime:
    """Return the time of sampling: prefill of every prompt once per engine, then decoding.

    It is at least that of the longest response alone. Products take the time of bfloat16, also with FP8 weights.
    """
    if not batch.sequences:
        return nothing(phase)
    gpu, tensor = cluster.gpu, rollouts.tensor
    response, prompt = workload.response_tokens, batch.prompt_tokens
    tokens, prefilled = batch.sequences * response, batch.prompts * prompt
    steps = max(tokens / batch.at_once, float(workload.longest_response))
    context = prompt + response / 2
    decode = batch.sequences * decoding_flops(a, prompt, response)
    prefill = batch.prompts * forward_flops(a, [(prompt, 0)])
    # A new token attends to all tokens before it, a prompt token on average to half of the prompt.
    decode_attention = 2 * tokens * a.num_layers * attention_flops(a, context)
    prefill_attention = prefilled * a.num_layers * attention_flops(a, prompt)
    compute = (decode - decode_attention) / DECODE_MATMUL_EFFICIENCY
    compute += (prefill - prefill_attention) / MATMUL_EFFICIENCY
    compute += (decode_attention + prefill_attention) / ATTENTION_EFFICIENCY
    read = served_bytes(a, visited_values(a, tokens / steps), rollouts.fp8)
    traffic = steps * read / tensor + tokens * context * cache_bytes_per_token(a, tensor)
    per_step = SERVER_STEP_S if rollouts.engine != "embedded" else EMBEDDED_LAYER_STEP_S * a.num_layers
    return PhaseTime(
        phase=phase,
        arithmetic_s=compute / tensor / gpu.flops_s,
        memory_s=traffic / (gpu.hbm_bytes_s * HBM_EFFICIENCY),
        communication_s=_decode_communication(a, tensor, tokens + prefilled, steps, cluster),
        other_s=steps * per_step,
        flops=engines * (decode + prefill),
        tokens=engines * tokens,
        streams=True,
    )


def _decode_communication(a: Architecture, tensor: int, tokens: float, steps: float, cluster: Cluster) -> float:
    """Return the seconds of two all-reduces per layer and step over a server's GPUs."""
    if tensor == 1:
        return 0.0
    bandwidth, hop = cluster.link(tensor)
    sent = 2.0 * (tensor - 1) / tensor * tokens * a.hidden_size * 2
    return 2.0 * a.num_layers * (steps * 2 * (tensor - 1) * hop + sent / bandwidth)


def sync(a: Architecture, layout: Layout, rollouts: RolloutSetup, cluster: Cluster) -> PhaseTime:
    """Return the time of a weight sync: gather over pipeline, tensor- and expert-parallel ranks, then send.

    What leaves the GPU for the servers leaves it now. The optimizer's state comes back beside scoring and training, the
    weights before these.
    """
    size = 2.0 * model_values(a)
    experts = 2.0 * a.num_layers * sum(expert_matrices(a, Layout()))
    pipeline_bandwidth, _ = cluster.link(layout.world)
    gather = size / layout.tensor / pipeline_bandwidth if layout.pipeline > 1 else 0.0
    for part, ranks, group in ((size - experts, layout.tensor, "tp"), (experts, layout.ranks("tp_ep"), "tp_ep")):
        bandwidth, _ = cluster.link(layout.span(group))
        gather += part * (ranks - 1) / ranks / bandwidth
    rates = {"separate": BROADCAST_SYNC_BYTES_S, "colocated": SHARED_SYNC_BYTES_S}
    state, weights = moved_bytes(a, layout, rollouts)
    moved = (state + 2.0 * weights) / HOST_LINK_BYTES_S
    handed = size / rates[rollouts.engine] if rollouts.engine in rates else 0.0
    # Copied twice, read and written; servers' weights are read once more, to compare digests with the servers'.
    passes = 4.0 + float(rollouts.engine in rates)
    traffic = passes * size / (cluster.gpu.hbm_bytes_s * HBM_EFFICIENCY)
    return PhaseTime(
        phase="sync",
        arithmetic_s=0.0,
        memory_s=traffic,
        communication_s=gather,
        other_s=handed + moved,
        flops=0.0,
        tokens=0.0,
    )
