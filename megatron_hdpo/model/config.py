"""The recipe's model section."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.model.specs import SpecName, transformer_engine_available

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModelConfig(BaseModel):
    """Which model is trained, and in what precision."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    path: str = Field(description="Hugging Face checkpoint folder: config.json, safetensors, tokenizer.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Type of weights and activations; main weights and gradients are fp32 either way."
    )
    spec: Literal["auto", "transformer_engine", "torch"] = Field(
        "auto",
        description="Layer spec; auto takes Transformer Engine on a GPU where it is installed, else plain torch.",
    )
    recompute: bool = Field(False, description="Recompute every layer's activations in the backward pass.")
    max_sequence: int | None = Field(
        None, ge=2, description="Longest sequence (prompt plus response); default: the model's own maximum."
    )


class ModelError(ValueError):
    """A model section of the recipe that cannot be built here."""


def choose_spec(config: ModelConfig, device: torch.device) -> SpecName:
    """The layer spec of this run. Raises ModelError when Transformer Engine is asked for and cannot run."""
    available = device.type == "cuda" and transformer_engine_available()
    if config.spec == "auto":
        return "transformer_engine" if available else "torch"
    if config.spec == "transformer_engine" and not available:
        raise ModelError("model.spec=transformer_engine needs a GPU and the transformer-engine package: use spec=torch")
    return config.spec
