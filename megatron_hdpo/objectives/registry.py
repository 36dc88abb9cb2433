"""Register of the objectives. To add one, write its file (docs/adding-an-objective.md) and name it here twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from megatron_hdpo.objectives.akl import AKLConfig, build_akl
from megatron_hdpo.objectives.base import ObjectiveDeps
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


OBJECTIVES: dict[type[ObjectiveSettings], Callable[[Any, ObjectiveDeps], Objective]] = {
    GRPOConfig: GRPO,
    HDPOConfig: HDPO,
    OPDConfig: build_opd,
    VOPDConfig: VOPD,
    AKLConfig: build_akl,
    OPSDConfig: OPSD,
    SDPOConfig: SDPO,
    SRPOConfig: SRPO,
    RLSDConfig: RLSD,
    RLCSDConfig: RLCSD,
    ContrastiveOPSDConfig: ContrastiveOPSD,
    PACEDConfig: PACED,
}
"""The class, or the function, that makes the objective of each settings class."""


def build_objective(config: ObjectiveSettings, deps: ObjectiveDeps) -> Objective:
    """Return the objective of a recipe's section. Raises KeyError for settings that OBJECTIVES does not name."""
    return OBJECTIVES[type(config)](config, deps)
