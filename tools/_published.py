"""Published measurements of other projects, compared with the planner's estimates.

Left out are the two figures from which constants of cluster.py are taken (verl's 30B over NCCL, SGLang's 30B by
buckets): they agree by construction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_hdpo.costs.cluster import (
    BROADCAST_SYNC_BYTES_S,
    GIB,
    GPUS,
    HBM_EFFICIENCY,
    MATMUL_EFFICIENCY,
    SHARED_SYNC_BYTES_S,
    Cluster,
)
from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.costs.workload import RolloutSetup, StudentScoring, Workload
from megatron_hdpo.planner.plan import plan
from megatron_hdpo.planner.sampling_time import sync
from megatron_hdpo.planner.shapes import SHAPES


@dataclass(frozen=True)
class Comparison:
    """A published time in seconds (the middle of a range) and the planned one. note: how comparable they are."""

    what: str
    published_s: float
    planned_s: float
    note: str

    @property
    def error(self) -> float:
        """Planned seconds divided by published seconds, minus one."""
        return self.planned_s / self.published_s - 1.0


def comparisons() -> list[Comparison]:
    """Return all comparisons."""
    return [*_syncs(), *_heads(), *_steps()]


NOT_COMPARED = (
    "NeMo-RL DeepSeek-V3 (128 to 512 H100): latent attention, which the trainer does not support",
    "OPSD 1.7B on 8 H100, about 3 h: number of steps and lengths are not published",
    "vime OPD 4B from 32B on 8 A800, about 2 min/step: lengths and batch are not published",
    "memory of chunked losses (NeMo-RL #2883, verl #6593, SkyRL #1610, #1751): chunk and layout are not published",
)


def _syncs() -> list[Comparison]:
    cluster, servers = Cluster(GPUS["h100"], 2), RolloutSetup("separate", 1, 8)
    rows = []
    for name, tensor, published in (("7b", 1, 5.75), ("32b", 4, 17.9), ("72b", 8, 28.8)):
        phase = sync(SHAPES[f"qwen2.5-{name}"], Layout(tensor, 1, 8 // tensor, tensor > 1), servers, cluster)
        rows.append(
            Comparison(f"verl, weights by NCCL, {name.upper()}", published, phase.time_s, "layout not published")
        )
    rows.append(Comparison("NeMo-RL, weights by NIXL, 69.95 GiB", 10.9, 69.95 * GIB / BROADCAST_SYNC_BYTES_S, "bytes"))
    rows.append(Comparison("SGLang, weights by buckets, 80B", 7.0, 2 * 80e9 / SHARED_SYNC_BYTES_S, "bytes"))
    rows.append(Comparison("SkyRL, weights by CUDA IPC, 14B", 1.6, 2 * 14.8e9 / SHARED_SYNC_BYTES_S, "bytes"))
    return rows


def _heads() -> list[Comparison]:
    """Compare Liger's fused linear JSD on an H100, V = 128k: logits of both sides and two products backward."""
    gpu, vocab, hidden = GPUS["h100"], 128_256, 4096
    rows = []
    for tokens, published in ((8192, 0.183), (1024, 0.111)):
        products = 4 * 2.0 * tokens * hidden * vocab / (MATMUL_EFFICIENCY * gpu.flops_s)
        traffic = 8.0 * tokens * vocab * 2 / (gpu.hbm_bytes_s * HBM_EFFICIENCY)
        note = "another implementation; hidden size 4,096 assumed"
        rows.append(Comparison(f"Liger fused linear JSD, {tokens} tokens", published, products + traffic, note))
    return rows


def _steps() -> list[Comparison]:
    """Compare NeMo-RL's GRPO steps.

    Tokens per step are computed from its table (tokens/s/GPU x GPUs x seconds). It scores with the old weights and with
    a reference. Its trainer frees the GPUs for the engine during sampling, which this package's does not: the cache is
    planned as if it did.
    """
    note = "layout, lengths assumed; trainer's memory free while sampling"
    scored = (StudentScoring("policy", 1.0, 200), StudentScoring("reference", 1.0, 200))
    work = Workload(64, 32, 200, 3106, 3896, micro_batch_tokens=4096, teacher="none", top_k=0, student_scorings=scored)
    layout = Layout(2, 1, 16, True, expert=8, overlap=True)
    servers = RolloutSetup("colocated", 2, memory_fraction=0.85)
    small = plan(SHAPES["qwen3-30b-a3b"], Cluster(GPUS["h100"], 4), layout, work, servers)
    work = replace(work, prompts=16, response_tokens=5616, longest_response=7992, micro_batch_tokens=8192)
    layout, servers = Layout(4, 2, 16, True, expert=16, overlap=True), replace(servers, tensor=8)
    large = plan(SHAPES["qwen3-235b-a22b"], Cluster(GPUS["h100"], 16), layout, work, servers)
    return [
        Comparison("NeMo-RL GRPO, Qwen3-30B-A3B, 32 H100, step", 192.0, small.step_s, note),
        Comparison("NeMo-RL GRPO, Qwen3-235B-A22B, 128 H100, step", 395.0, large.step_s, note),
    ]
