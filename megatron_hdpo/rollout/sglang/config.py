"""The sglang part of the rollout section: servers, requests, and weight updates."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_hdpo.rollout.sglang.servers.config import ServerConfig


class WeightSyncConfig(BaseModel):
    """Transfer of the trainer's weights to the servers."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    path: Literal["auto", "tensor", "distributed", "disk"] = Field(
        "auto",
        description="tensor: with the request itself (CUDA IPC on a GPU that both share, by value on a CPU); "
        "distributed: broadcast in a process group (NCCL, gloo on a CPU); disk: through a folder that all nodes see; "
        "auto: tensor on a CPU and where servers are colocated, else distributed.",
    )
    bucket_mib: int = Field(256, ge=1, description="Tensors travel in buckets of at most this size.")
    timeout_s: float = Field(
        600,
        gt=0,
        description="Longest wait for one answer of a server during a sync, and for the end of one broadcast; while "
        "ranks gather a sharded model, at most 0.3 of parallel.timeout_minutes.",
    )
    pause: Literal["retract", "in_place", "abort"] = Field(
        "retract",
        description="Treatment of samples in progress: retract queues them again and recomputes their keys and values "
        "with the new weights; in_place continues with the old keys and values; abort drops them, they are "
        "sampled again.",
    )
    folder: Path | None = Field(None, description="For path=disk; by default sync/ in the run folder.")
    verify: bool = Field(
        True, description="Compare the servers' checksum of every parameter with the trainer's, after each sync."
    )
    min_peak: float = Field(
        2.0,
        ge=0,
        description="With verify: the likeliest token's probability times the vocabulary size, averaged over a few "
        "tokens, must be at least this, or the weights count as broken; 0 accepts an untrained model.",
    )


class SGLangConfig(BaseModel):
    """Stock SGLang servers: started by the run, or given by their URLs."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    placement: Literal["colocated", "separate", "given"] = Field(
        "colocated",
        description="colocated: servers on the trainer's own GPUs, one per tensor_parallel ranks; separate: on the "
        "GPUs of this node that `gpus` names; given: `urls`.",
    )
    gpus: list[int] = Field(default_factory=list, description="For placement=separate: device numbers of each node.")
    trainer_memory: Literal["keep", "optimizer", "all"] = Field(
        "keep",
        description="For placement=colocated: what leaves the GPUs for host memory while servers sample. keep: "
        "nothing; optimizer: its state, and gradients are freed; all: the weights, too. Needs servers.memory_saver on "
        "GPUs.",
    )
    replicas: int | None = Field(
        None, ge=1, description="Servers per node; as many as the GPUs allow by default, on a CPU one."
    )
    urls: list[str] = Field(default_factory=list, description="For placement=given: the servers' own addresses.")
    router: str | None = Field(
        None,
        description="Address of an sglang-router in front of the servers; it gets the sampling requests, the servers "
        "get all others.",
    )
    api_key_variable: str | None = Field(
        None, description="For placement=given: environment variable that holds the servers' key."
    )
    servers: ServerConfig = Field(default_factory=ServerConfig, description="Settings of the servers that are started.")
    max_concurrency: int = Field(256, ge=1, description="Samples in flight per server.")
    request_timeout_s: float = Field(1800, gt=0, description="Deadline of one sample.")
    max_tries: int = Field(4, ge=1, description="Tries of a sample without an answer, on any server, with jitter.")
    health_interval_s: float = Field(15, gt=0, description="Seconds between health checks of each server.")
    health_timeout_s: float = Field(
        60,
        gt=0,
        description="A server without a successful health check for this long counts as hung.",
    )
    mixed_versions: Literal["keep", "drop"] = Field(
        "keep",
        description="With rollouts sampled ahead: keep or drop samples that two versions of the weights generated.",
    )
    sync: WeightSyncConfig = Field(default_factory=WeightSyncConfig, description="How weights reach the servers.")

    @model_validator(mode="after")
    def _placement(self) -> SGLangConfig:
        given = self.placement == "given"
        if given != bool(self.urls):
            raise ValueError("urls: name the servers' addresses with placement=given, and only then")
        if self.trainer_memory != "keep" and self.placement != "colocated":
            raise ValueError("trainer_memory: only with placement=colocated servers and trainer share memory")
        if self.router and not given:
            raise ValueError("router: needs placement=given with the urls of the servers behind it")
        if bool(self.gpus) != (self.placement == "separate"):
            raise ValueError("gpus: name the servers' devices with placement=separate, and only then")
        if len(set(self.urls)) != len(self.urls) or len(set(self.gpus)) != len(self.gpus):
            raise ValueError("urls and gpus: each may be named once")
        return self
