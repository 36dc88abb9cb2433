"""Seconds of one phase of a step, by cause."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_hdpo.costs.cluster import LAUNCH_S, Cluster
from megatron_hdpo.costs.collectives import Collective


@dataclass(frozen=True)
class MicroBatchTime:
    """One micro-batch on the slowest stage: seconds of its kernels and of the host's launches.

    The host runs ahead of the GPU, so the longer of the two decides.
    """

    gpu_s: float = 0.0
    launches: int = 0

    @property
    def host_s(self) -> float:
        """Return the seconds in which the host launches the kernels."""
        return self.launches * LAUNCH_S

    @property
    def time_s(self) -> float:
        """Return the longer of the two."""
        return max(self.gpu_s, self.host_s)

    @property
    def waits_s(self) -> float:
        """Return the seconds in which the GPU waits for the host."""
        return max(0.0, self.host_s - self.gpu_s)


@dataclass(frozen=True)
class PhaseTime:
    """Seconds on the busiest GPU.

    flops: useful ones of the whole phase over all GPUs, without recomputation.

    other_s: bubble of the pipeline, host transfers, fixed costs. tokens: sampled, scored or trained, over all GPUs.
    streams: one kernel computes while it reads, so arithmetic and memory traffic overlap. hidden_s: communication that
    overlaps with computation and is not part of communication_s. host_s: the GPU waits for the host to launch kernels.
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
    hidden_s: float = 0.0
    host_s: float = 0.0
    micro_batch: MicroBatchTime = field(default_factory=MicroBatchTime)

    @property
    def bound_s(self) -> float:
        """Return the roofline: the largest of arithmetic, memory traffic and communication."""
        return max(self.arithmetic_s, self.memory_s, self.communication_s)

    @property
    def time_s(self) -> float:
        """Return the planned seconds of this phase."""
        computed = (self.arithmetic_s, self.memory_s)
        return (max(computed) if self.streams else sum(computed)) + self.communication_s + self.host_s + self.other_s

    def mfu(self, cluster: Cluster, gpus: int) -> float:
        """Return useful arithmetic divided by the peak of `gpus` GPUs in bf16."""
        return self.flops / (self.time_s * gpus * cluster.gpu.flops_s) if self.time_s else 0.0


def nothing(phase: str) -> PhaseTime:
    """Return a phase without work."""
    return PhaseTime(
        phase=phase, arithmetic_s=0.0, memory_s=0.0, communication_s=0.0, other_s=0.0, flops=0.0, tokens=0.0
    )
