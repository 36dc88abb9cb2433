"""The checkpoint section of the recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class CheckpointConfig(BaseModel):
    """Schedule and contents of checkpoints."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    every: int = Field(50, ge=1, description="Steps between checkpoints; the last step always has one.")
    keep: int = Field(2, ge=1, description="Number of newest checkpoints that are kept.")
    keep_every: int | None = Field(
        None, ge=1, description="Keep all checkpoints whose step is a multiple of this, besides the newest; null: none."
    )
    reshardable: bool = Field(
        False,
        description="Write the optimizer's state so that a run can resume at any layout (parallel section). A rank "
        "needs 12 bytes of host memory per parameter that it holds for this, and temporarily up to 8 on "
        "the device.",
    )
    verify: Literal["full", "fast"] = Field(
        "full",
        description="What is compared with a checkpoint's manifest before a run resumes: every byte, or the "
        "sizes of all files and the contents of small ones.",
    )
    export: bool = Field(True, description="Write the trained model as a Hugging Face checkpoint at the end (hf/).")
