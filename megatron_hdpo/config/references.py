"""Objects of the user's own that a recipe refers to, found in all of its sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from megatron_hdpo.config.recipe import Recipe
from megatron_hdpo.types.plugins import LoadedReference


def references(recipe: Recipe) -> dict[str, LoadedReference]:
    """Return what the sections of a recipe were loaded from, by reference; a section keeps it as `reference`."""
    return {loaded.reference: loaded for loaded in _below(recipe)}


def _below(value: Any) -> Iterator[LoadedReference]:
    if isinstance(value, BaseModel):
        loaded = getattr(value, "_reference", None)
        if isinstance(loaded, LoadedReference):
            yield loaded
        children: list[Any] = [getattr(value, name) for name in type(value).model_fields]
    elif isinstance(value, list | tuple):
        children = list(value)
    else:
        children = list(value.values()) if isinstance(value, dict) else []
    for child in children:
        yield from _below(child)
