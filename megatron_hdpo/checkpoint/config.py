"""The checkpoint section of the recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class CheckpointConfig(BaseModel):
    """When checkpoints are written, and how many stay."""

    model_config = ConfigDict(extra="forbid")

    every: int = Field(50, ge=1, description="Steps between checkpoints; the last step always has one.")
    keep: int = Field(2, ge=1, description="Newest checkpoints that stay on disk.")
    reshardable: bool = Field(
        False,
        description="Write the optimizer's state so that a run can go on at any layout (parallel section). For each "
        "parameter that it holds a rank gathers 12 bytes in host memory, up to 8 on the device in passing.",
    )
    export: bool = Field(True, description="Write the trained model as a Hugging Face checkpoint at the end (hf/).")
