"""Secrets of a recipe: used, but never written.

Whatever writes or shows a recipe takes `redacted`, where `***` stands in place of a secret: the value of a key that is
named like one, a variable of the servers, a header of a reward service. In a recipe that is read,
`***` for a variable of the servers means: the value of this process's own variable of that name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_hdpo.types.secrets import MARK, without_passwords

_SECRET_KEY = re.compile(r"(?i)(?:^|[._-])(?:api[._-]?key|token|password|passwd|secret|credentials?)$")
_VARIABLES = ("servers", "environment")


def is_secret(path: Sequence[str]) -> bool:
    """Return whether the value at a key.path is a secret by its key, whatever the value."""
    return _is_variable(path) or "headers" in path[-2:-1] or bool(path and _SECRET_KEY.search(path[-1]))


def redacted(tree: Any) -> Any:
    """Return a recipe's tree without its secrets, to be written or shown."""
    return _with_texts(tree, _hidden)


def restored(tree: Any, environment: Mapping[str, str]) -> tuple[Any, list[str]]:
    """Return the tree with the secrets that `redacted` has taken out, and an error for each that is not to be had."""
    errors: list[str] = []

    def found(path: Sequence[str], text: str) -> str:
        where, anything = ".".join(path), text.replace(MARK, "x")
        if text == MARK and _is_variable(path):
            if path[-1] not in environment:
                errors.append(f"{where}: {MARK} stands for a secret: set the environment variable {path[-1]}")
            return environment.get(path[-1], text)
        if MARK in text and _hidden(path, anything) != anything:
            errors.append(f"{where}: {MARK} stands for a secret that was not written: give the value again")
        return text

    return _with_texts(tree, found), errors


def _is_variable(path: Sequence[str]) -> bool:
    return tuple(path[-3:-1]) == _VARIABLES


def _hidden(path: Sequence[str], text: str) -> str:
    return MARK if is_secret(path) else without_passwords(text)


def _with_texts(tree: Any, changed: Callable[[Sequence[str], str], str], path: tuple[str, ...] = ()) -> Any:
    """Return the tree with `changed(path, text)` for each text."""
    if isinstance(tree, dict):
        return {key: _with_texts(value, changed, (*path, str(key))) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_texts(value, changed, (*path, str(index))) for index, value in enumerate(tree)]
    return changed(path, tree) if isinstance(tree, str) else tree
