"""Every objective by name. To add one, write its file (docs/adding-an-objective.md) and name it here, in two places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from megatron_hdpo.data.leakage import LeakageConfig
from megatron_hdpo.data.prompts import PromptBuilder
from megatron_hdpo.objectives.akl import AKLConfig, build_akl
from megatron_hdpo.objectives.contrastive_opsd import ContrastiveOPSD, ContrastiveOPSDConfig
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig
from megatron_hdpo.objectives.hdpo import HDPO, HDPOConfig
from megatron_hdpo.objectives.opd import OPDConfig, build_opd
from megatron_hdpo.objectives.opsd import OPSD, OPSDConfig
from megatron_hdpo.objectives.paced import PACED, PACEDConfig
from megatron_hdpo.objectives.rlcsd import RLCSD, RLCSDConfig
from megatron_hdpo.objectives.rlsd import RLSD, RLSDConfig
from megatron_hdpo.objectives.sdpo import SDPO, SDPOConfig
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.objectives.srpo import SRPO, SRPOConfig
from megatron_hdpo.objectives.vopd import VOPD, VOPDConfig
from megatron_hdpo.types.learning import Objective

ObjectiveConfig = Annotated[
    GRPOConfig
    | HDPOConfig
    | OPDConfig
    | VOPDConfig
    | AKLConfig
    | OPSDConfig
    | SDPOConfig
    | SRPOConfig
    | RLSDConfig
    | RLCSDConfig
    | ContrastiveOPSDConfig
    | PACEDConfig,
    Field(discriminator="name"),
]


@dataclass(frozen=True)
class Materials:
    """What methods are built from, beside their settings. temperature: of the rollouts."""

    temperature: float
    updates_per_step: int
    prompts: PromptBuilder
    leakage: LeakageConfig = field(default_factory=LeakageConfig)


_BUILDERS: dict[type[ObjectiveSettings], Callable[[Any, Materials], Objective]] = {
    GRPOConfig: lambda config, m: GRPO(config, m.temperature, m.updates_per_step),
    HDPOConfig: lambda config, m: HDPO(config, m.temperature, m.updates_per_step, m.leakage, m.prompts.markers),
    OPDConfig: lambda config, m: build_opd(config, m.temperature, m.updates_per_step),
    VOPDConfig: lambda config, m: VOPD(config, m.temperature, m.updates_per_step),
    AKLConfig: lambda config, m: build_akl(config, m.temperature, m.updates_per_step),
    OPSDConfig: lambda config, m: OPSD(config, m.temperature, m.prompts, m.updates_per_step),
    SDPOConfig: lambda config, m: SDPO(config, m.temperature, m.prompts, m.updates_per_step),
    SRPOConfig: lambda config, m: SRPO(config, m.temperature, m.prompts, m.updates_per_step),
    RLSDConfig: lambda config, m: RLSD(config, m.temperature, m.prompts, m.updates_per_step),
    RLCSDConfig: lambda config, m: RLCSD(config, m.temperature, m.prompts, m.updates_per_step),
    ContrastiveOPSDConfig: lambda config, m: ContrastiveOPSD(config, m.temperature, m.prompts, m.updates_per_step),
    PACEDConfig: lambda config, m: PACED(
        config, m.temperature, m.prompts, m.updates_per_step, m.leakage, m.prompts.markers
    ),
}


def build_objective(config: ObjectiveSettings, materials: Materials) -> Objective:
    """The objective of a recipe's section."""
    return _BUILDERS[type(config)](config, materials)
