"""Recipe sections `health` and `self_test`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class HealthConfig(BaseModel):
    """What is checked of ranks, nodes and links before the first step, and watched in every step."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = Field(True, description="Check before the first step; seconds, and nothing is loaded before.")
    max_clock_offset_s: float = Field(
        5.0,
        gt=0,
        description="Furthest that a clock may be from rank 0's. torchrun's agents judge each other's heartbeats by "
        "their clocks: some 15 s apart they give each other up.",
    )
    shared_folder_timeout_s: float = Field(
        10.0, gt=0, description="Time in which every rank must see a file that rank 0 wrote into the run folder."
    )
    min_free_disk_gb: float = Field(1.0, ge=0, description="Free space that the run folder must have at least.")
    min_free_gpu_share: float = Field(
        0.8, ge=0, le=1, description="Share of each GPU's memory that must be free before the model is built."
    )
    min_allreduce_gb_per_s: float | None = Field(
        None, gt=0, description="Least bus bandwidth of an all-reduce over all ranks; by default it is only reported."
    )
    slow_device_ratio: float = Field(
        1.3, gt=1, description="A device whose matrix product takes this many times the median is warned of."
    )
    every: int | None = Field(
        None, ge=1, description="Steps between new measurements of the all-reduce; half of the first one is warned of."
    )
    straggler_ratio: float = Field(
        1.3, gt=1, description="A rank whose forward and backward pass take this many times the median is a straggler."
    )
    straggler_steps: int = Field(3, ge=1, description="Steps in a row after which a straggler is warned of.")


class SelfTestConfig(BaseModel):
    """What the start-up self-test checks, and how exact it wants it."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = Field(True, description="Run the self-test before the first step.")
    prompts: int = Field(4, ge=1, description="Prompts that it samples one response each of.")
    max_new_tokens: int = Field(16, ge=1, description="Tokens per response.")
    mean_logprob_difference: float | None = Field(
        None, gt=0, description="Mean |engine - trainer| allowed; default 1e-3 when both are float32, else 0.05."
    )
    max_divergence: float = Field(1e-5, gt=0, description="Divergence of a teacher with the student's prompt, at most.")
