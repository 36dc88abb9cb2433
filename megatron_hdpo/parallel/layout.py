"""Parallel layouts: the split of a model over ranks, and the checks of what a model allows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from megatron_hdpo.types.errors import UserError
from megatron_hdpo.types.phases import PHASES


class ParallelConfig(BaseModel):
    """The parallel layout. The data-parallel size is world size / (tensor x context x pipeline)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    tensor: int = Field(1, ge=1, description="Ranks that share every layer's weights (TP).")
    pipeline: int = Field(1, ge=1, description="Stages that share the layers (PP), scheduled 1F1B.")
    virtual_stages: int = Field(
        1, ge=1, description="Chunks of layers on each pipeline rank (VPP); above 1 the schedule is interleaved 1F1B."
    )
    context: int = Field(1, ge=1, description="Ranks that share the tokens of every sequence (CP).")
    expert: int = Field(1, ge=1, description="Ranks that share the experts of every MoE layer (EP).")
    expert_tensor: int = Field(1, ge=1, description="Ranks that share the weights of every expert (ETP).")
    sequence: bool = Field(False, description="Split activations between TP regions along the sequence (SP).")
    overlap: bool | Literal["auto"] = Field(
        "auto",
        description="Reduce gradients and gather updated weights over the replicas while computation goes on; auto: on "
        "GPUs with several replicas.",
    )
    timeout_minutes: float = Field(
        10.0,
        gt=0,
        description="Longest time for which ranks wait in a collective for another one whose work makes no progress; "
        "and for one whose process gives no sign of life (there at least 1).",
    )
    silence_minutes: float = Field(
        60.0,
        gt=0,
        description="Longest time for which ranks wait for another one whose work makes no progress: rollouts, "
        "evaluation, servers, checkpoints, data. Work that progresses may take any time.",
    )
    phase_minutes: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="Instead of both, for a rank that makes no progress in these phases: {save: 120, train: 5}. Phases "
        "have the names that the console shows.",
    )

    @field_validator("phase_minutes")
    @classmethod
    def _known_phases(cls, minutes: dict[str, float]) -> dict[str, float]:
        if unknown := [phase for phase in minutes if phase not in PHASES]:
            raise ValueError(f"{unknown[0]!r} is no phase: choose from {', '.join(PHASES)}")
        return minutes

    @property
    def model_ranks(self) -> int:
        """Return the number of ranks that hold one copy of the model (one data-parallel replica)."""
        return self.tensor * self.context * self.pipeline

    @property
    def expert_ranks(self) -> int:
        """Return the number of ranks that hold one copy of the experts."""
        return self.expert_tensor * self.expert * self.pipeline

    @property
    def least_ranks(self) -> int:
        """Return the smallest number of ranks that the layout fits."""
        return math.lcm(self.model_ranks, self.expert_ranks)


class LayoutError(UserError, ValueError):
    """A parallel layout that the model or the number of ranks does not allow; the text names the recipe's key."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model that a layout must divide.

    num_experts: 0 for a dense model; its ffn_size is then that of every layer.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    num_experts: int = 0
    expert_ffn_size: int = 0


def check_layout(layout: ParallelConfig, sizes: ModelSizes, world_size: int) -> None:
    """Raise LayoutError with every reason why the layout cannot split the model over `world_size` ranks."""
    reasons = [*_rank_reasons(layout, world_size), *_size_reasons(layout, sizes), *_expert_reasons(layout, sizes)]
    if layout.sequence and layout.tensor == 1:
        reasons.append("parallel.sequence=true needs parallel.tensor > 1")
    if layout.virtual_stages > 1 and layout.pipeline == 1:
        reasons.append(f"parallel.virtual_stages={layout.virtual_stages} needs parallel.pipeline > 1")
    if reasons:
        raise LayoutError("; ".join(reasons))


def check_ranks(layout: ParallelConfig, world_size: int) -> None:
    """Raise LayoutError when no model can use this layout on `world_size` ranks."""
    if reasons := list(_rank_reasons(layout, world_size)):
        raise LayoutError("; ".join(reasons))


def _rank_reasons(layout: ParallelConfig, world_size: int) -> Iterator[str]:
    if world_size % layout.model_ranks:
        yield (
            f"{world_size} ranks are no multiple of parallel.tensor x parallel.context x parallel.pipeline = "
            f"{layout.tensor} x {layout.context} x {layout.pipeline}: start a multiple of {layout.model_ranks}"
        )
    if layout.expert * layout.expert_tensor > 1 and world_size % layout.expert_ranks:
        yield (
            f"{world_size} ranks are no multiple of parallel.expert_tensor x parallel.expert x parallel.pipeline = "
            f"{layout.expert_tensor} x {layout.expert} x {layout.pipeline}"
        )


def _size_reasons(layout: ParallelConfig, sizes: ModelSizes) -> Iterator[str]:
    tp, chunks = layout.tensor, layout.pipeline * layout.virtual_stages
    divided = [("attention heads", sizes.num_heads), ("key-value heads", sizes.num_kv_heads)]
    if not sizes.num_experts:
        divided.append(("FFN channels", sizes.ffn_size))
    for what, count in divided:
        if count % tp:
            yield f"parallel.tensor={tp} does not divide the model's {count} {what}"
    if sizes.num_layers % chunks:
        keys = "parallel.pipeline" if layout.virtual_stages == 1 else "parallel.pipeline x parallel.virtual_stages"
        yield f"{keys}={chunks} does not divide the model's {sizes.num_layers} layers"


def _expert_reasons(layout: ParallelConfig, sizes: ModelSizes) -> Iterator[str]:
    if not sizes.num_experts:
        if layout.expert > 1 or layout.expert_tensor > 1:
            yield "parallel.expert and parallel.expert_tensor are for models with experts, this one is dense"
        return
    if sizes.num_experts % layout.expert:
        yield f"parallel.expert={layout.expert} does not divide the model's {sizes.num_experts} experts"
    if sizes.expert_ffn_size % layout.expert_tensor:
        yield f"parallel.expert_tensor={layout.expert_tensor} does not divide {sizes.expert_ffn_size} expert channels"
    if layout.tensor > 1 and not layout.sequence:
        yield "a model with experts and parallel.tensor > 1 needs parallel.sequence=true"
