"""pydantic's validation errors as lines that name keys as the recipe's writer wrote them."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Place:
    """What may stand at a key. models: the sections, one of which `discriminator` chooses when there are several."""

    models: tuple[type[BaseModel], ...] = ()
    discriminator: str | None = None
    items: Any = None

    def tagged(self, tag: object) -> type[BaseModel] | None:
        """The section that a discriminator's value chooses."""
        return next((model for model in self.models if tag in self.tags_of(model)), None)

    def tags_of(self, model: type[BaseModel]) -> tuple[Any, ...]:
        """Values of the discriminator that choose `model`."""
        if self.discriminator is None:
            return ()
        annotation = model.model_fields[self.discriminator].annotation
        return get_args(annotation) if get_origin(annotation) is Literal else ()

    @property
    def tags(self) -> list[str]:
        """All values of the discriminator."""
        return [str(tag) for model in self.models for tag in self.tags_of(model)]

    @property
    def keys(self) -> list[str]:
        """Keys that any of the sections knows."""
        return list(dict.fromkeys(key for model in self.models for key in model.model_fields))


def error_lines(error: ValidationError, root: type[BaseModel]) -> Iterator[str]:
    """One line per error, `key.path: what is wrong`."""
    for item in error.errors():
        path, place = _locate(item["loc"], root)
        yield _line(path, place, item)


def _line(path: Sequence[str], place: Place, item: Any) -> str:
    kind, given, context = item["type"], item["input"], item.get("ctx", {})
    where = ".".join(path)
    if kind == "extra_forbidden":
        return f"{where}: unknown key{_suggestion(path[-1], place.keys)}"
    if kind == "missing":
        return f"{where}: required key is missing"
    if kind == "union_tag_not_found":
        return f"{where}.{place.discriminator}: required key is missing, one of {', '.join(place.tags)}"
    if kind == "union_tag_invalid":
        tag = str(context["tag"])
        return f"{where}.{place.discriminator}: {tag} is not one of {', '.join(place.tags)}{_close(tag, place.tags)}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{where}: must be a section with keys of its own (given: {given!r})"
    message = item["msg"].removeprefix("Value error, ")
    if kind == "value_error" and isinstance(given, dict | list):
        return f"{where}: {message}"
    shown = "a section" if isinstance(given, dict) else "a list" if isinstance(given, list) else repr(given)
    return f"{where}: {message} (given: {shown})"


def _locate(location: Sequence[int | str], root: type[BaseModel]) -> tuple[list[str], Place]:
    """The path without the tags that pydantic puts into it, and the innermost section around its last key (or, where
    the error is about a whole value, what may stand there)."""
    path: list[str] = []
    here = around = Place((root,))
    for part in location:
        chosen = here.tagged(part)
        if chosen is not None:
            here = Place((chosen,))
            continue
        path.append(str(part))
        around, here = here, _child(here, part)
    return path, here if here.discriminator else around


def _child(place: Place, key: int | str) -> Place:
    if isinstance(key, int):
        return Place() if place.items is None else _place(place.items)
    for model in place.models:
        if key in model.model_fields:
            field = model.model_fields[key]
            return _place(field.annotation, field.discriminator)
    return Place()


def _place(annotation: Any, discriminator: Any = None) -> Place:
    if get_origin(annotation) is Annotated:
        annotation, *notes = get_args(annotation)
        discriminator = next((n.discriminator for n in notes if isinstance(n, FieldInfo)), discriminator)
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    models = tuple(m for m in members if isinstance(m, type) and issubclass(m, BaseModel))
    items = next((get_args(m)[0] for m in members if get_origin(m) is list), None)
    return Place(models, discriminator if isinstance(discriminator, str) else None, items)


def _suggestion(key: str, known: Sequence[str]) -> str:
    return _close(key, known) or (f"; known keys: {', '.join(known)}" if known else "")


def _close(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
