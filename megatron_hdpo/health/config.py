"""The health and self_test sections of the recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class HealthConfig(BaseModel):
    """Checks of ranks, nodes and links before the first step and during the run."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    enabled: bool = Field(
        True,
        description="Check before the first step and before anything is loaded; takes seconds.",
    )
    max_clock_offset_s: float = Field(
        5.0,
        gt=0,
        description="Largest difference of a clock from rank 0's. torchrun's agents compare heartbeats by their "
        "clocks: at about 15 s apart they give each other up.",
    )
    shared_folder_timeout_s: float = Field(
        10.0, gt=0, description="Time in which every rank must see a file that rank 0 wrote into the run folder."
    )
    min_free_disk_gb: float = Field(1.0, ge=0, description="Least free space in the run folder.")
    min_free_gpu_share: float = Field(
        0.8, ge=0, le=1, description="Share of each GPU's memory that must be free before the model is built."
    )
    min_allreduce_gb_per_s: float | None = Field(
        None, gt=0, description="Least bus bandwidth of an all-reduce over all ranks; by default it is only reported."
    )
    slow_device_ratio: float = Field(
        1.3, gt=1, description="Warn of a device whose matrix product takes this many times the median."
    )
    every: int | None = Field(
        None,
        ge=1,
        description="Steps between measurements of the all-reduce; a bandwidth below half of the first one gives a "
        "warning.",
    )
    straggler_ratio: float = Field(
        1.3, gt=1, description="A rank whose forward and backward pass take this many times the median is a straggler."
    )
    straggler_steps: int = Field(3, ge=1, description="Steps in a row as a straggler before the warning.")


class SelfTestConfig(BaseModel):
    """Size and tolerances of the self-test at start."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    enabled: bool = Field(True, description="Run the self-test before the first step.")
    prompts: int = Field(4, ge=1, description="Prompts, with one sampled response each.")
    max_new_tokens: int = Field(16, ge=1, description="Tokens per response.")
    mean_logprob_difference: float | None = Field(
        None,
        gt=0,
        description="Mean |engine - trainer| allowed; default 0.5 when FP8 rounds the products of one of them, 1e-3 "
        "when both are float32, else 0.05.",
    )
    max_divergence: float = Field(
        1e-5,
        gt=0,
        description="Largest divergence allowed of a teacher with the student's prompt.",
    )
