"""Objectives that a user wrote outside this package: what a recipe may refer to, and what is made of it."""

from __future__ import annotations

from typing import Any, get_type_hints

from megatron_hdpo.objectives.base import BaseObjective, ObjectiveDeps
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.types.learning import Objective
from megatron_hdpo.types.plugins import LoadedReference, PluginError

_METHODS = [name for name in vars(Objective) if not name.startswith("_")]
_VALUES = list(Objective.__annotations__)


def own_settings(loaded: LoadedReference) -> type[ObjectiveSettings]:
    """Return the class of the settings of an objective that a recipe refers to: the annotation of its `config`.

    Raises PluginError for an object that is no objective, and for one without such an annotation.
    """
    where, found = loaded.reference, loaded.value
    if not isinstance(found, type):
        raise PluginError(f"{where} is no objective: it is {type(found).__name__}, and must be a class")
    missing = [name for name in _METHODS if _is_missing(found, name)]
    if missing:
        raise PluginError(
            f"{where} is no objective: it has no {', '.join(missing)} (most extend "
            "megatron_hdpo.objectives.base.BaseObjective)"
        )
    settings = _annotation(where, found)
    if not (isinstance(settings, type) and issubclass(settings, ObjectiveSettings)):
        raise PluginError(
            f"{where}: the annotation of `config` must be a class that extends "
            "megatron_hdpo.objectives.settings.ObjectiveSettings"
        )
    return settings


def own_objective(reference: LoadedReference, config: ObjectiveSettings, deps: ObjectiveDeps) -> Objective:
    """Return the object of a user's class. Raises PluginError when it lacks a value that every objective has."""
    made: Objective = reference.value(config, deps)
    if missing := [name for name in _VALUES if not hasattr(made, name)]:
        raise PluginError(f"{reference.reference}: the object has no {', '.join(missing)} after its __init__")
    return made


def _is_missing(objective: type, name: str) -> bool:
    return not hasattr(objective, name) or getattr(objective, name) is vars(BaseObjective)["loss"]


def _annotation(where: str, objective: type) -> Any:
    try:
        hints = get_type_hints(objective)
    except Exception as error:  # an annotation may hold any expression
        raise PluginError(f"{where}: its annotations cannot be read: {type(error).__name__}: {error}") from error
    if "config" not in hints:
        raise PluginError(f"{where} does not say what its settings are: annotate `config: YourSettings` in the class")
    return hints["config"]
