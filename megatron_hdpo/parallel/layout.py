"""How a model is split over ranks, and which splits a model allows."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ParallelConfig(BaseModel):
    """The parallel layout. Data parallelism takes what is left: world size / (tensor x pipeline)."""

    model_config = ConfigDict(extra="forbid")

    tensor: int = Field(1, ge=1, description="Ranks that share every layer's weights (TP).")
    pipeline: int = Field(1, ge=1, description="Stages that share the layers (PP), scheduled 1F1B.")
    sequence: bool = Field(False, description="Split activations between TP regions along the sequence (SP).")
    timeout_minutes: float = Field(
        10.0, gt=0, description="Deadline of a collective; past it the run stops and names the rank that is late."
    )

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model (one data-parallel replica)."""
        return self.tensor * self.pipeline


class LayoutError(ValueError):
    """A layout that the model or the number of ranks does not allow. The text names the recipe's key."""


def check_layout(
    layout: ParallelConfig,
    *,
    world_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    ffn_size: int,
) -> None:
    """Raise LayoutError, with every reason, when the model cannot be split like this over `world_size` ranks."""
    reasons = []
    tp, pp = layout.tensor, layout.pipeline
    if world_size % layout.model_ranks:
        reasons.append(f"{world_size} ranks are no multiple of parallel.tensor x parallel.pipeline = {tp} x {pp}")
    for what, count in (("attention heads", num_heads), ("key-value heads", num_kv_heads), ("FFN channels", ffn_size)):
        if count % tp:
            reasons.append(f"parallel.tensor={tp} does not divide the model's {count} {what}")
    if num_layers % pp:
        reasons.append(f"parallel.pipeline={pp} does not divide the model's {num_layers} layers")
    if layout.sequence and tp == 1:
        reasons.append("parallel.sequence=true needs parallel.tensor > 1")
    if reasons:
        raise LayoutError("; ".join(reasons))
