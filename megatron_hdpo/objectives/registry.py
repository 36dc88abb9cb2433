"""Every objective by name. To add one, write its file (docs/adding-an-objective.md) and name it here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from megatron_hdpo.data.leakage import LeakageConfig
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig
from megatron_hdpo.objectives.hdpo import HDPO, HDPOConfig
from megatron_hdpo.objectives.interface import Objective

ObjectiveConfig = Annotated[GRPOConfig | HDPOConfig, Field(discriminator="name")]


def build_objective(
    config: GRPOConfig | HDPOConfig,
    temperature: float,
    updates_per_step: int,
    leakage: LeakageConfig,
    leak_markers: Sequence[str],
) -> Objective:
    """The objective of a recipe. temperature: of the rollouts."""
    if isinstance(config, HDPOConfig):
        return HDPO(config, temperature, updates_per_step, leakage, leak_markers)
    return GRPO(config, temperature, updates_per_step)
