"""One way to lay a model over the GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.parallel.layout import LayoutError, ParallelConfig, check_layout
from megatron_hdpo.planner.errors import PlanError

Spec = Literal["torch", "transformer_engine"]


@dataclass(frozen=True)
class Layout:
    """Ranks per dimension, and what decides over memory beside them. Ranks are numbered tensor, data, pipeline.

    spec: whose modules save activations. value_bytes: of a weight or an activation (2: bfloat16).
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    recompute: bool = False
    spec: Spec = "transformer_engine"
    value_bytes: int = 2

    @property
    def world(self) -> int:
        """All ranks."""
        return self.tensor * self.pipeline * self.data

    @property
    def sequence_ranks(self) -> int:
        """Ranks that share the rows outside the tensor-parallel regions."""
        return self.tensor if self.sequence else 1

    @property
    def stages(self) -> list[int]:
        """One pipeline stage of each kind; of the middle ones the first, which holds most micro-batches."""
        return sorted({0, min(1, self.pipeline - 1), self.pipeline - 1})

    def span(self, group: str) -> int:
        """Consecutive ranks among which a group's ranks lie."""
        return {"tp": self.tensor, "dp_cp": self.tensor * self.data}.get(group, self.world)

    def __str__(self) -> str:
        extras = [name for name, on in (("SP", self.sequence), ("recompute", self.recompute)) if on]
        return " ".join([f"TP {self.tensor} x PP {self.pipeline} x DP {self.data}", *extras])


def check(layout: Layout, architecture: Architecture) -> None:
    """Raise PlanError where the trainer would refuse the layout."""
    try:
        check_layout(
            ParallelConfig(tensor=layout.tensor, pipeline=layout.pipeline, sequence=layout.sequence),
            architecture.sizes,
            layout.world,
        )
    except LayoutError as error:
        raise PlanError(str(error)) from error
