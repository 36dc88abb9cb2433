"""Explanations of recipe keys, read from the schema itself: meaning, type, bounds, choices and default."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_hdpo.config.errors import SchemaNode, node_of, schema_node, suggestion
from megatron_hdpo.config.recipe import Recipe, RecipeError
from megatron_hdpo.types.plugins import FORMS, PluginError, is_reference

_BOUNDS = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}", "min_length": "at least {} of them"}
_NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", Any: "any value"}
_LONGEST_DEFAULT = 60

COMMAND = "python -m megatron_hdpo explain"


@dataclass(frozen=True)
class Key:
    """One key of the recipe's schema.

    path: the key as a recipe's writer spells it, `[]` after a list. kinds: the values of discriminators on the way to
    it (a method, a task, a teacher); () outside of unions. type: the text of type, bounds and choices. default: the
    text of the default; None for a required key. node: what may stand below the key.
    """

    path: str
    meaning: str
    type: str
    default: str | None
    node: SchemaNode = field(compare=False)
    kinds: tuple[str, ...] = field(default=(), compare=False)
    value: Any = field(default=PydanticUndefined, compare=False)

    @property
    def is_section(self) -> bool:
        """Return whether the key holds a section, or a list of sections."""
        return bool(self.node.models)


def explain(path: str | None = None) -> str:
    """Return the explanation of one key, of a section and its keys, or (without a path) of the top-level sections.

    path: a key such as `rollout.temperature`; `objective.sdpo.distill` chooses one kind of a union,
    `objective.path/to/file.py:Mine` a class of the user's own, and list indices may be left out. Raises RecipeError,
    with a suggestion, for a key that does not exist, and for a class that cannot be loaded.
    """
    if path is None:
        lines = [f"The sections of a recipe; `{COMMAND} SECTION` lists the keys of one:", ""]
        return "\n".join([*lines, *_listed(_children(_ROOT))])
    found = _find(path)
    lines = []
    for key, kinds in _merged(found):
        lines += [f"{key.path}{_for_kinds(kinds, found)}", f"    {key.meaning}"]
        if not key.is_section:
            default = "none: the key is required" if key.default is None else key.default
            lines += [f"    type: {key.type}", f"    default: {default}"]
    if not found[0].is_section:
        return "\n".join(lines)
    return "\n".join([*lines, *_section_text(found)])


def _section_text(found: Sequence[Key]) -> Iterator[str]:
    node = found[0].node
    if node.discriminator is not None and len(node.models) > 1:
        path = found[0].path.replace("[]", "")
        yield f"    chosen by `{node.discriminator}`; `{COMMAND} {path}.KIND` lists the keys of one:"
        yield ""
        for model in node.models:
            yield from (f"{tag}\n    {_summary(model)}" for tag in node.tags_of(model))
        if node.open is not None:
            yield from ["", *_own_classes(path, node)]
        return
    yield ""
    yield from _listed([key for parent in found for key in _children(parent)])


def _own_classes(path: str, node: SchemaNode) -> Iterator[str]:
    assert node.open is not None
    if names := [name for name in node.open.names if name not in node.tags]:
        yield f"from installed packages: {', '.join(names)}"
    yield f"or a class of your own: {FORMS}; `{COMMAND} {path}.path/to/file.py:Name` lists its keys"


def _listed(keys: Sequence[Key]) -> Iterator[str]:
    for key, kinds in _merged(keys):
        default = f" ({_default_note(key)})" if _default_note(key) else ""
        yield f"{key.path}: {key.type}{default}{_for_kinds(kinds, keys)}"
        yield f"    {key.meaning}"


def all_keys() -> Iterator[Key]:
    """Yield every key of the schema, sections before their keys; a key of a union once for each of its kinds."""
    yield from _below(_ROOT)


def _below(key: Key) -> Iterator[Key]:
    for child in _children(key):
        yield child
        yield from _below(child)


def _children(parent: Key) -> list[Key]:
    """Return the keys of a section; for a union those of every kind."""
    return [
        _key(parent, model, name, info) for model in parent.node.models for name, info in model.model_fields.items()
    ]


def _key(parent: Key, model: type[BaseModel], name: str, info: FieldInfo) -> Key:
    node = node_of(info)
    many = node.items is not None
    if many:
        node = schema_node(node.items)
    tags = parent.node.tags_of(model) if len(parent.node.models) > 1 else ()
    # A default that the section around the key sets counts, not that of the key's own class (warmup.optimizer.lr).
    own = info.get_default(call_default_factory=True)
    value = getattr(parent.value, name) if isinstance(parent.value, model) else own
    if name == parent.node.discriminator:
        meaning = f"Chooses the kind. {tags[0]}: {_summary(model)}" if tags else _summary(model)
        if parent.kinds and is_reference(parent.kinds[-1]):
            value = PydanticUndefined  # the reference itself, which has no default
    else:
        meaning = info.description or " ".join(_summary(model) for model in node.models[:1])
    return Key(
        path=f"{parent.path}.{name}".removeprefix(".") + "[]" * (many and bool(node.models)),
        meaning=" ".join(meaning.split()),
        type=type_text(info.annotation, info.metadata),
        default=None if value is PydanticUndefined else _value_text(value),
        node=node,
        kinds=(*parent.kinds, *map(str, tags)),
        value=value,
    )


_ROOT = Key("", "", "section", None, SchemaNode((Recipe,)))


def _find(path: str) -> list[Key]:
    """Return the keys at a path, one for each kind of the unions on the way. Raises RecipeError."""
    here, parts = [_ROOT], _parts(path)
    if is_reference(path):
        here, parts = _own_class(path)
    elif not parts:
        raise RecipeError(f"explain {path!r}: name a key, such as rollout.temperature, or none for all sections")
    for part in parts:
        if not here[0].is_section:
            raise RecipeError(f"{path}: {here[0].path} is a value, not a section; explain {here[0].path}")
        children = [child for key in here for child in _children(key)]
        below = [child for child in children if _name(child) == part]
        # Keys first: only for a word that is none, the installed packages are asked for their entry points.
        found = below or [_of_kind(key, model, part) for key in here if (model := _kind(key.node, part)) is not None]
        if not found:
            raise RecipeError(f"{path}: unknown key{_hint(part, here, children)}")
        here = found
    return here


def _parts(path: str) -> list[str]:
    return [part for part in re.split(r"[.\[\]]+", path.strip()) if part and not part.isdigit()]


def _own_class(path: str) -> tuple[list[Key], list[str]]:
    """Return the section at a path such as `objective.lab/mine.py:Mine.size`, and the keys below it.

    Raises RecipeError.
    """
    for key in all_keys():
        section = re.escape(key.path).replace(r"\[\]", r"(?:\[?\.?\d*\]?)")
        found = key.node.open and re.fullmatch(rf"{section}\.([^:]*:\w+)(?:\.(.*))?", path.strip())
        if found:
            try:
                model = key.node.chosen(found[1])
            except PluginError as error:
                raise RecipeError(f"{path}: {error}") from error
            assert model is not None
            return [_of_kind(key, model, found[1])], _parts(found[2] or "")
    sections = ", ".join(key.path.replace("[]", "") for key in all_keys() if key.node.open)
    raise RecipeError(f"{path}: a class of your own stands below one of {sections}")


def _kind(node: SchemaNode, tag: str) -> type[BaseModel] | None:
    """Return the class of one kind of a union: of this package, or an entry point of another."""
    named = node.open is not None and tag not in node.tags and tag in node.open.names
    try:
        return node.chosen(tag) if named else node.tagged(tag)
    except PluginError as error:
        raise RecipeError(str(error)) from error


def _of_kind(key: Key, model: type[BaseModel], tag: str) -> Key:
    """Return the union as a section of one kind."""
    node = SchemaNode((model,), key.node.discriminator)
    return Key(
        path=key.path,
        meaning=_summary(model),
        type="section",
        default=key.default,
        node=node,
        kinds=(*key.kinds, tag),
        value=key.value,
    )


def _hint(part: str, here: Sequence[Key], children: Sequence[Key]) -> str:
    known = [*dict.fromkeys(_name(child) for child in children), *(tag for key in here for tag in key.node.tags)]
    elsewhere = list(dict.fromkeys(key.path for key in all_keys() if _name(key) == part))
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere[:3])}?"
    return suggestion(part, known)


def _name(key: Key) -> str:
    return key.path.rpartition(".")[2].removesuffix("[]")


def _merged(keys: Sequence[Key]) -> list[tuple[Key, list[str]]]:
    """Return equal keys once, with the kinds that have them; keys of one path stand together."""
    kinds: dict[Key, list[str]] = {}
    for key in keys:
        kinds.setdefault(key, []).extend(key.kinds[-1:])
    order = list(dict.fromkeys(key.path for key in keys))
    return sorted(kinds.items(), key=lambda item: order.index(item[0].path))


def _for_kinds(kinds: Sequence[str], among: Sequence[Key]) -> str:
    """Return the kinds in brackets where not all of them have the key."""
    everyone = {kind for key in among for kind in key.kinds[-1:]}
    return f" [{', '.join(dict.fromkeys(kinds))}]" if kinds and set(kinds) != everyone else ""


def _summary(model: type[BaseModel]) -> str:
    """Return the first paragraph of a section class's docstring."""
    return " ".join((inspect.getdoc(model) or "").partition("\n\n")[0].split())


def type_text(annotation: Any, notes: Sequence[Any] = ()) -> str:
    """Return the type of a field in words, with its choices and bounds (notes: pydantic's metadata)."""
    if get_origin(annotation) is Annotated:
        annotation, *own = get_args(annotation)
        notes = [*notes, *(note for item in own for note in getattr(item, "metadata", [item]))]
    known = [(note, name) for note in notes for name in _BOUNDS if hasattr(note, name)]
    bounds = [_BOUNDS[name].format(getattr(note, name)) for note, name in known]
    return ", ".join([_plain_type(annotation), *bounds])


def _plain_type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(_value_text, arguments))}" if len(arguments) > 1 else _value_text(arguments[0])
    if origin in (Union, types.UnionType):
        members = dict.fromkeys("null" if member is type(None) else type_text(member) for member in arguments)
        return " or ".join(members)
    if origin is list:
        return f"list of ({type_text(arguments[0])})"
    if origin is tuple:
        return f"list of {len(arguments)}: {type_text(arguments[0])}"
    if origin is dict:
        return f"mapping of {type_text(arguments[0])} to {type_text(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _value_text(value: Any) -> str:
    """Return a value the way a recipe writes it on one line; of a section only that it is one."""
    if isinstance(value, BaseModel):
        return "a section"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w./:-]*", value):
        return value
    return json.dumps(value, default=str, ensure_ascii=False)


def _default_note(key: Key) -> str:
    """Return the default for a list of keys, cut where it is long; nothing for a section that has one."""
    if key.default is None:
        return "required"
    if isinstance(key.value, BaseModel):
        return ""
    cut = len(key.default) > _LONGEST_DEFAULT
    return f"default: {key.default[:_LONGEST_DEFAULT]}{'…' if cut else ''}"


def markdown() -> str:
    """Return docs/configuration.md: every section of the recipe as a table of its keys."""
    lines = [
        "# Every key of a recipe",
        "",
        f"Written by `{COMMAND} --markdown` from the section classes (after `source .venv/bin/activate`): edit those, "
        "not this page.",
        f"`{COMMAND} rollout.temperature` explains one key in the terminal. Editors that read JSON schemas complete "
        "and check recipes by `docs/recipe.schema.json`.",
        "",
        "Kinds in brackets after a meaning are the only ones that have the key, or have it with this default. Defaults "
        f"longer than {_LONGEST_DEFAULT} characters are cut here; `explain` prints them whole.",
    ]
    seen: dict[tuple[type[BaseModel], ...], str] = {}
    lines += ["", "## Top level", "", *_table(_children(_ROOT))]
    for section in _children(_ROOT):
        lines += _tables([section], seen)
    return "\n".join(lines) + "\n"


def _tables(sections: Sequence[Key], seen: dict[tuple[type[BaseModel], ...], str]) -> Iterator[str]:
    """Yield the table of a section (given once for each kind of the unions around it), then those of its sections."""
    first = sections[0]
    if not first.is_section:
        return
    yield from ["", f"## {first.path}", "", _escaped(first.meaning)]
    if first.node.open is not None:
        own = f"Besides the kinds here, `{first.node.discriminator}` takes a class of your own: {FORMS}"
        yield from ["", f"{own}, or an entry point of an installed package."]
    if len(first.node.models) > 1 and seen.setdefault(first.node.models, first.path) != first.path:
        yield from ["", f"The keys are those of `{seen[first.node.models]}`."]
        return
    keys = [key for section in sections for key in _children(section)]
    yield from ["", *_table(keys)]
    for name in dict.fromkeys(key.path for key in keys if key.is_section):
        yield from _tables([key for key in keys if key.path == name], seen)


def _table(keys: Sequence[Key]) -> Iterator[str]:
    yield from ["| Key | Type | Default | Meaning |", "|---|---|---|---|"]
    for key, kinds in _merged(keys):
        default, meaning = _default_note(key), f"{key.meaning}{_for_kinds(kinds, keys)}"
        default = f"`{default.removeprefix('default: ')}`" if default.startswith("default") else default
        yield f"| `{key.path}` | {_escaped(key.type)} | {_escaped(default)} | {_escaped(meaning)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def json_schema() -> str:
    """Return docs/recipe.schema.json: the recipe's JSON schema, for editors."""
    return json.dumps(Recipe.model_json_schema(), indent=1, ensure_ascii=False) + "\n"
