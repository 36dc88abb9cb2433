"""Register of the objectives. One of your own needs no change here (docs/adding-an-objective.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from megatron_hdpo.objectives.akl import AKLConfig, build_akl
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.contrastive_opsd import ContrastiveOPSD, ContrastiveOPSDConfig
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig
from megatron_hdpo.objectives.hdpo import HDPO, HDPOConfig
from megatron_hdpo.objectives.opd import OPDConfig, build_opd
from megatron_hdpo.objectives.opsd import OPSD, OPSDConfig
from megatron_hdpo.objectives.own import own_objective, own_settings
from megatron_hdpo.objectives.paced import PACED, PACEDConfig
from megatron_hdpo.objectives.rlcsd import RLCSD, RLCSDConfig
from megatron_hdpo.objectives.rlsd import RLSD, RLSDConfig
from megatron_hdpo.objectives.sdpo import SDPO, SDPOConfig
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.objectives.srpo import SRPO, SRPOConfig
from megatron_hdpo.objectives.vopd import VOPD, VOPDConfig
from megatron_hdpo.types.learning import Objective
from megatron_hdpo.types.open_union import OpenUnion

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


GROUP = "megatron_hdpo.objectives"
"""Entry points by which an installed package offers objectives."""

ObjectiveConfig = Annotated[ObjectiveSettings, OpenUnion(tuple(OBJECTIVES), "name", GROUP, own_settings)]
"""Section of an objective: one of OBJECTIVES, chosen by its name, or that of a class that the name refers to."""


def build_objective(config: ObjectiveSettings, deps: ObjectiveDeps) -> Objective:
    """Return the objective of a recipe's section.

    Raises KeyError for settings that neither OBJECTIVES nor a recipe names, PluginError for an object of a user's class
    that lacks a part of an objective.
    """
    if config.reference is None:
        return OBJECTIVES[type(config)](config, deps)
    return own_objective(config.reference, config, deps)
