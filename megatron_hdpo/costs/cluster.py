"""Hardware: GPUs, nodes and links, and the share of their peaks that programs reach.

Peaks are the vendor's data sheets. Every factor below one is a named constant with its source; "assumed" marks
those that were not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hdpo.costs.errors import PlanError

GIB = 2**30

# Large bf16 matrix products against the dense peak. Megatron-Core reports up to 47 % MFU over whole steps on H100,
# with attention, norms, optimizer and communication in it; products alone are assumed to reach 70 %.
MATMUL_EFFICIENCY = 0.70
# FP8 products against the dense FP8 peak: the quantisation of inputs is in it. Assumed: 1.4 x the speed of bf16.
FP8_MATMUL_EFFICIENCY = 0.49
# Experts' products, of few rows each, against those of whole matrices; the busiest rank's rows over the mean. Assumed.
EXPERT_EFFICIENCY = 0.70
EXPERT_IMBALANCE = 1.2
# Products of few rows (decoding) are bound by memory; where they are not, assumed.
DECODE_MATMUL_EFFICIENCY = 0.50
# Flash attention in bf16 against the same peak. Assumed, between the published 35 % (FA2) and 75 % (FA3) of an H100.
ATTENTION_EFFICIENCY = 0.50
# Streaming kernels against the data sheet's HBM bandwidth. Assumed.
HBM_EFFICIENCY = 0.80
# nccl-tests on 8 x H100 over NVLink 4: bus bandwidth 460-480 GB/s for all-reduce with in-switch reduction; without it,
# and for all-gather and reduce-scatter, some 80 % of the 450 GB/s per direction. Assumed from that.
NVLINK_EFFICIENCY = 0.80
# Large messages over 400 Gb/s InfiniBand. Assumed.
INFINIBAND_EFFICIENCY = 0.80
# Seconds per step of a ring. Assumed.
NVLINK_HOP_S = 2e-6
INFINIBAND_HOP_S = 5e-6
# Host to device over PCIe 5 x16, pinned (64 GB/s by the data sheet). Assumed.
HOST_LINK_BYTES_S = 50e9
# Share of a micro-batch's backward pass (of its attention, under context parallelism) that communication beside it can
# hide behind. Assumed.
OVERLAP_SHARE = 0.8
# Adam on the host: bytes of main weights, moments and gradients that pass through a CPU per second and GPU. Assumed.
HOST_ADAM_BYTES_S = 20e9
# CUDA context, NCCL buffers, cuBLAS workspaces and fragmentation. Assumed.
FRAMEWORK_BYTES = 4 * GIB
# One decoding step of a server beside its kernels' traffic: scheduler and launch under CUDA graphs. Assumed.
SERVER_STEP_S = 2e-3
# One layer of one decoding step of the embedded engine, which launches kernel by kernel from Python. Assumed.
EMBEDDED_LAYER_STEP_S = 3e-4
# Weights given to servers over NCCL: verl's 30B model in about 7 s (8.25 GB/s), published.
BROADCAST_SYNC_BYTES_S = 8.25e9
# Weights given to servers on the same GPUs: SGLang's 30B model (61 GB) by flattened buckets in 2.5 s, published.
SHARED_SYNC_BYTES_S = 24.4e9
# One kernel launched by the host through Python, dispatcher, autograd and driver: 5 to 25 us are usual in eager mode
# (3 us of them in the driver alone: meta-pytorch/tritonbench #1017); fewer where C++ runs the backward pass. Assumed.
LAUNCH_S = 10e-6
# A checkpoint written to a shared file system, by one node. Assumed.
CHECKPOINT_BYTES_S = 2e9


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a GPU, and its memory in bytes.

    flops_s: dense bf16. fp8_flops_s: dense FP8. Bytes per second of HBM, and of NVLink and InfiniBand per direction.
    """

    name: str
    flops_s: float
    fp8_flops_s: float
    hbm_bytes_s: float
    memory: int
    nvlink_bytes_s: float
    infiniband_bytes_s: float


GPUS = {
    "h100": Gpu(
        name="h100",
        flops_s=989.4e12,
        fp8_flops_s=1978.9e12,
        hbm_bytes_s=3.35e12,
        memory=80 * 10**9,
        nvlink_bytes_s=450e9,
        infiniband_bytes_s=50e9,
    ),
    "h200": Gpu(
        name="h200",
        flops_s=989.4e12,
        fp8_flops_s=1978.9e12,
        hbm_bytes_s=4.8e12,
        memory=141 * 10**9,
        nvlink_bytes_s=450e9,
        infiniband_bytes_s=50e9,
    ),
}


@dataclass(frozen=True)
class Cluster:
    """Cluster of equal nodes with equal GPUs; each GPU has an InfiniBand port of its own."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int = 8

    @property
    def gpus(self) -> int:
        """Return the number of GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    def link(self, span: int) -> tuple[float, float]:
        """Return (bytes/s per direction, seconds per hop) of a group that lies within `span` consecutive ranks."""
        if span <= self.gpus_per_node:
            return self.gpu.nvlink_bytes_s * NVLINK_EFFICIENCY, NVLINK_HOP_S
        return self.gpu.infiniband_bytes_s * INFINIBAND_EFFICIENCY, INFINIBAND_HOP_S


def peak_flops_s(device_name: str) -> float | None:
    """Return the dense bf16 peak of a CUDA device name; None if it is not an SXM part of the table.

    PCIe and NVL parts have lower peaks under the same model number.
    """
    words = device_name.lower().split()
    if "pcie" in words or "nvl" in words:
        return None
    return next((gpu.flops_s for name, gpu in GPUS.items() if name in words), None)


def cluster_of(gpu: str, nodes: int, gpus_per_node: int = 8) -> Cluster:
    """Return a cluster by the name of its GPU. Raises PlanError for an unknown name and for counts below one."""
    if gpu.lower() not in GPUS:
        raise PlanError(f"gpu {gpu} is not known; known: {', '.join(GPUS)}")
    if nodes < 1 or gpus_per_node < 1:
        raise PlanError(f"{nodes} nodes of {gpus_per_node} GPUs: at least one of each")
    return Cluster(GPUS[gpu.lower()], nodes, gpus_per_node)
