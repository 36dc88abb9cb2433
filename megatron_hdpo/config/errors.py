"""Validation errors of pydantic as lines that name keys the way a recipe writes them."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megatron_hdpo.config.secrets import is_secret
from megatron_hdpo.config.yaml_text import one_line
from megatron_hdpo.types.open_union import ERROR, OpenUnion
from megatron_hdpo.types.plugins import FORMS
from megatron_hdpo.types.secrets import MARK, without_passwords


@dataclass(frozen=True)
class SchemaNode:
    """A node of the recipe's schema: what is allowed at a key.

    models: the section classes; `discriminator` is the key whose value chooses one of them when there are several.
    items: the annotation of a list's items, None for anything else. open: says which classes of a user may stand here
    besides `models`; None where none may.
    """

    models: tuple[type[BaseModel], ...] = ()
    discriminator: str | None = None
    items: Any = None
    open: OpenUnion | None = None

    def tagged(self, tag: object) -> type[BaseModel] | None:
        """Return the section class of this package that a discriminator's value chooses; None when it chooses none."""
        return next((model for model in self.models if tag in self.tags_of(model)), None)

    def chosen(self, tag: object) -> type[BaseModel] | None:
        """Return the section class that a discriminator's value chooses, a reference too. Raises PluginError."""
        if self.open is None or not isinstance(tag, str):
            return self.tagged(tag)
        return self.tagged(tag) or self.open.section(tag)

    def tags_of(self, model: type[BaseModel]) -> tuple[Any, ...]:
        """Return the values of the discriminator that choose `model`."""
        if self.discriminator is None:
            return ()
        annotation = model.model_fields[self.discriminator].annotation
        return get_args(annotation) if get_origin(annotation) is Literal else ()

    @property
    def tags(self) -> list[str]:
        """Return all values of the discriminator."""
        return [str(tag) for model in self.models for tag in self.tags_of(model)]

    @property
    def keys(self) -> list[str]:
        """Return the keys that any of the section classes has."""
        return list(dict.fromkeys(key for model in self.models for key in model.model_fields))


def error_lines(error: ValidationError, root: type[BaseModel]) -> Iterator[str]:
    """Yield one line per error, `key.path: what is wrong`."""
    for item in error.errors():
        path, node = _locate(item["loc"], root)
        yield _line(path, node, item)


def _line(path: Sequence[str], node: SchemaNode, item: Any) -> str:
    kind, given, context = item["type"], item["input"], item.get("ctx", {})
    where = ".".join(map(one_line, path))
    if kind == "extra_forbidden":
        return f"{where}: unknown key{suggestion(path[-1], node.keys)}"
    if kind == "missing":
        return f"{where}: required key is missing"
    if kind == "union_tag_not_found":
        return f"{where}.{node.discriminator}: required key is missing, one of {', '.join(node.tags)}"
    if kind == "union_tag_invalid":
        tag, known = one_line(str(context["tag"])), node.open.names if node.open else node.tags
        hint = _close(tag, known) or (f"; a class of your own is {FORMS}" if node.open else "")
        return f"{where}.{node.discriminator}: {tag} is not one of {', '.join(known)}{hint}"
    if kind == ERROR:
        return f"{where}.{node.discriminator}: {one_line(item['msg'], 2000)}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{where}: must be a section with keys of its own (given: {_shown(given, path)})"
    message = one_line(item["msg"].removeprefix("Value error, "), 2000)
    if kind == "value_error" and isinstance(given, dict | list):
        return f"{where}: {message}"
    shown = "a section" if isinstance(given, dict) else "a list" if isinstance(given, list) else _shown(given, path)
    return f"{where}: {message} (given: {shown})"


def _shown(given: object, path: Sequence[str]) -> str:
    if is_secret(path) or path[-1:] == ["environment"]:
        return MARK
    return "null" if given is None else one_line(without_passwords(repr(given)))


def _locate(location: Sequence[int | str], root: type[BaseModel]) -> tuple[list[str], SchemaNode]:
    """Return the path without pydantic's tags, and the innermost section around its last key.

    Where the error is about a whole union, return the union's node in place of the section around it.
    """
    path: list[str] = []
    here = around = SchemaNode((root,))
    for part in location:
        chosen = here.chosen(part)
        if chosen is not None:
            here = SchemaNode((chosen,))
            continue
        path.append(str(part))
        around, here = here, _child(here, part)
    return path, here if here.discriminator else around


def _child(node: SchemaNode, key: int | str) -> SchemaNode:
    if isinstance(key, int):
        return SchemaNode() if node.items is None else schema_node(node.items)
    for model in node.models:
        if key in model.model_fields:
            return node_of(model.model_fields[key])
    return SchemaNode()


def node_of(field: FieldInfo) -> SchemaNode:
    """Return what a field of a section allows."""
    return schema_node(field.annotation, field.discriminator, field.metadata)


def schema_node(annotation: Any, discriminator: Any = None, notes: Sequence[Any] = ()) -> SchemaNode:
    """Return what a field with this annotation (and discriminator, and pydantic's metadata) allows."""
    if get_origin(annotation) is Annotated:
        annotation, *notes = get_args(annotation)
    if opened := next((note for note in notes if isinstance(note, OpenUnion)), None):
        return SchemaNode(opened.built_in, opened.key, open=opened)
    if notes:
        discriminator = next((n.discriminator for n in notes if isinstance(n, FieldInfo)), discriminator)
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    models = tuple(m for m in members if isinstance(m, type) and issubclass(m, BaseModel))
    items = next((get_args(m)[0] for m in members if get_origin(m) is list), None)
    return SchemaNode(models, discriminator if isinstance(discriminator, str) else None, items)


def suggestion(key: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown key: the closest known key, else all of them."""
    return _close(key, known) or (f"; known keys: {', '.join(known)}" if known else "")


def _close(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
