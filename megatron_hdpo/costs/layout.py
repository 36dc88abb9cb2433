"""Layout of a model over the GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_hdpo.costs.errors import PlanError
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.parallel.layout import LayoutError, ParallelConfig, check_layout

Spec = Literal["torch", "transformer_engine"]


@dataclass(frozen=True)
class Layout:
    """Ranks per dimension, and the other settings that decide memory and time.

    Rank order, fastest first: tensor, context, data, pipeline; for experts expert_tensor, expert, the rest, pipeline.

    data: replicas (context-parallel ranks belong to one replica). recompute: whole layers; recomputed: parts of a layer
    (model.recompute_modules), if not whole ones. spec: implementation of the modules. value_bytes: of a weight or an
    activation (2: bfloat16). fp8: of the layers' products. overlap: collectives over the replicas run during
    computation. offload: share of the optimizer on the host.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    recompute: bool = False
    spec: Spec = "transformer_engine"
    value_bytes: int = 2
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    virtual_stages: int = 1
    recomputed: tuple[str, ...] = ()
    fp8: bool = False
    overlap: bool = False
    offload: float = 0.0

    @property
    def world(self) -> int:
        """Return the number of all ranks."""
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def sequence_ranks(self) -> int:
        """Return the number of ranks that share the rows outside the tensor-parallel regions."""
        return self.tensor if self.sequence else 1

    @property
    def shards(self) -> int:
        """Return the number of ranks that share the optimizer of non-expert weights and sum their gradients."""
        return self.data * self.context

    @property
    def expert_shards(self) -> int:
        """Return the number of ranks that hold the same experts, share their optimizer and sum their gradients."""
        return self.world // (self.pipeline * self.expert * self.expert_tensor)

    @property
    def experts_apart(self) -> bool:
        """Return whether experts have a data-parallel group of their own."""
        return self.expert > 1 or self.expert_tensor != self.tensor

    @property
    def stages(self) -> list[int]:
        """Return one pipeline stage of each kind: first, last, and the first middle one (most micro-batches)."""
        return sorted({0, min(1, self.pipeline - 1), self.pipeline - 1})

    def ranks(self, group: str) -> int:
        """Return the number of ranks of a group."""
        sizes = {
            "tp": self.tensor,
            "cp": self.context,
            "pp": self.pipeline,
            "dp_cp": self.shards,
            "ep": self.expert,
            "expt_tp": self.expert_tensor,
            "tp_ep": self.expert_tensor * self.expert,
            "expt_dp": self.expert_shards,
            "embd": min(2, self.pipeline),
        }
        return sizes.get(group, self.world)

    def span(self, group: str) -> int:
        """Return the number of consecutive ranks within which a group lies."""
        spans = {
            "tp": self.tensor,
            "cp": self.tensor * self.context,
            "dp_cp": self.tensor * self.shards,
            "ep": self.expert_tensor * self.expert,
            "expt_tp": self.expert_tensor,
            "tp_ep": self.expert_tensor * self.expert,
            "expt_dp": self.world // self.pipeline,
        }
        return spans.get(group, self.world)

    def __str__(self) -> str:
        sizes = [("TP", self.tensor), ("PP", self.pipeline), ("DP", self.data)]
        more = [("CP", self.context), ("EP", self.expert), ("ETP", self.expert_tensor), ("VPP", self.virtual_stages)]
        sizes += [(name, size) for name, size in more if size > 1]
        extras = [name for name, on in (("SP", self.sequence), ("recompute", self.recompute), ("FP8", self.fp8)) if on]
        extras += [f"recompute {module}" for module in self.recomputed]
        extras += [f"offload {self.offload:g}"] if self.offload else []
        return " ".join([" x ".join(f"{name} {size}" for name, size in sizes), *extras])


def check(layout: Layout, architecture: Architecture) -> None:
    """Raise PlanError where the trainer would refuse the layout."""
    config = ParallelConfig(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual_stages=layout.virtual_stages,
        context=layout.context,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        sequence=layout.sequence,
    )
    try:
        check_layout(config, architecture.sizes, layout.world)
    except LayoutError as error:
        raise PlanError(str(error)) from error
