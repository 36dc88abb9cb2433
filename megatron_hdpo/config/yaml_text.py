"""YAML of recipes: PyYAML with what would be misread, or would take hours, refused.

PyYAML reads YAML 1.1, where 1:30 is the number 90, 010 is 8, 1e-6 is text and 2020-01-01 is no text. Here 1:30 and
2020-01-01 are text, 1e-6 is a number, and 010 is refused. The limits are far beyond any recipe; without them a short
text of aliases or brackets takes hours.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.constructor import ConstructorError

MAX_CHARACTERS = 2**18
MAX_VALUES = 20_000
MAX_DEPTH = 50
_MAX_DIGITS = 100
_PREFIX = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+$")
_FLOAT = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)
_AMBIGUOUS = "!leading-zero"
_KNOWN = {f"{_PREFIX}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


@dataclass(frozen=True)
class YamlTree:
    """Content of a YAML document. lines: by key.path, the line of the key, counted from 1."""

    value: Any
    lines: dict[str, int] = field(default_factory=dict)


class TooLarge(yaml.YAMLError):
    """A text that is longer, deeper or larger than any recipe."""


def read_yaml(text: str) -> YamlTree:
    """Return the content of a YAML text, without anything shared between two places.

    Raises YAMLError: for what YAML forbids, a key given twice, a number with leading zeros, tags of Python or of other
    types, an alias inside itself, and texts beyond the limits of this module.
    """
    if len(text) > MAX_CHARACTERS:
        raise TooLarge(f"it has {len(text):,} characters, a recipe at most {MAX_CHARACTERS:,}")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return YamlTree(None)
        return YamlTree(_unshared(loader.construct_document(node)), dict(_lines(node)))
    finally:
        loader.dispose()


def write_yaml(value: Any) -> str:
    """Return a tree as YAML text that `read_yaml`, and any reader of YAML 1.1, reads back as it was."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def problem_of(error: yaml.YAMLError) -> str:
    """Return what is wrong, in one line, with its line and column where they are known."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return one_line(" ".join(str(error).split()))
    return f"line {mark.line + 1}, column {mark.column + 1}: {one_line(getattr(error, 'problem', None))}"


def one_line(value: object, limit: int = 200) -> str:
    """Return a text, or what stands for another value, in one line of printable characters that is not too long."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


class _Loader(yaml.SafeLoader):
    """Loader with the rules of this module."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node; aliases count as often as they are used."""
        is_alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark
        if self._depth >= MAX_DEPTH:
            raise ConstructorError(None, None, f"more than {MAX_DEPTH} levels inside each other", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if is_alias and node not in self._sizes:
            raise ConstructorError(None, None, "an alias inside the value that it stands for", mark)
        if not is_alias:
            self._sizes[node] = 1 + sum(self._sizes[child] for child in _children(node))
        if self._sizes[node] > MAX_VALUES:
            raise ConstructorError(None, None, f"aliases make more than {MAX_VALUES:,} values of this", mark)
        if len(self._sizes) > MAX_VALUES:
            raise ConstructorError(None, None, f"more than {MAX_VALUES:,} values", mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node."""
        if node.tag == _AMBIGUOUS:
            problem = f"{node.value} may be read with base 8 or 10: write it without leading zeros, or quote it as text"
            raise ConstructorError(None, None, problem, node.start_mark)
        if node.tag not in _KNOWN:
            raise ConstructorError(None, None, f"recipes have no values of the type {node.tag}", node.start_mark)
        if node.tag == f"{_PREFIX}int" and len(node.value) > _MAX_DIGITS:
            problem = f"an integer of {len(node.value):,} characters does not fit into 64 bits"
            raise ConstructorError(None, None, problem, node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            problem = f"this is no {node.tag.removeprefix(_PREFIX)}"
            raise ConstructorError(None, None, problem, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping; PyYAML would keep the last of two values of a key without a word."""
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == f"{_PREFIX}merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise ConstructorError(None, None, f"the key {one_line(key)} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, Hashable) else None)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writer that quotes a text which either reader would take for something else."""


def _with_own_numbers(*without: str) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Return PyYAML's rules for plain values and those of this module; without: types whose rules are left out."""
    replaced = {f"{_PREFIX}{name}" for name in without}
    rules = {
        first: [(tag, pattern) for tag, pattern in given if tag not in replaced]
        for first, given in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    own = ((f"{_PREFIX}int", _INTEGER), (f"{_PREFIX}float", _FLOAT), (_AMBIGUOUS, _LEADING_ZERO))
    for first in "-+.0123456789":
        rules[first] = [*rules.get(first, []), *own]
    return rules


_Loader.yaml_implicit_resolvers = _with_own_numbers("int", "float", "timestamp", "value")
_Dumper.yaml_implicit_resolvers = _with_own_numbers()


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        yield from child if isinstance(child, tuple) else (child,)


def _lines(node: yaml.Node, path: str = "") -> Iterator[tuple[str, int]]:
    """Yield (key.path, line) of every value below a node."""
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(index), value, value) for index, value in enumerate(node.value)]
    else:
        return
    for name, marked, value in children:
        below = f"{path}.{name}" if path else str(name)
        yield below, marked.start_mark.line + 1
        yield from _lines(value, below)


def _unshared(value: Any) -> Any:
    """Return a copy for every alias (`*name`), so that an override changes only the place it names."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value
