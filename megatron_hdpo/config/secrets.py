"""Secrets of a recipe: used, but never written.

Whatever writes or shows a recipe takes `redacted`, where `***` stands in place of a secret. In a recipe that is read,
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
    return tuple(path[-3:-1]) == _VARIABLES or bool(path and _SECRET_KEY.search(path[-1]))


def redacted(tree: Any) -> Any:
    """Return a recipe's tree without its secrets, to be written or shown."""

    def hidden(path: tuple[str, ...], text: str) -> str:
        return MARK if is_secret(path) else without_passwords(text)

    return _with_texts(tree, hidden)


def restored(tree: Any, environment: Mapping[str, str]) -> tuple[Any, list[str]]:
    """Return the tree with the secrets that `redacted` has taken out, and an error for each that is not to be had."""
    errors: list[str] = []

    def found(path: tuple[str, ...], text: str) -> str:
        if text == MARK and tuple(path[-3:-1]) == _VARIABLES:
            if path[-1] in environment:
                return environment[path[-1]]
            errors.append(f"{'.'.join(path)}: {MARK} stands for a secret: set the environment variable {path[-1]}")
        elif MARK in text and redacted_anew(path, text):
            errors.append(f"{'.'.join(path)}: {MARK} stands for a secret that was not written: give the value again")
        return text

    def redacted_anew(path: tuple[str, ...], text: str) -> bool:
        return (
            text == MARK if is_secret(path) else without_passwords(text.replace(MARK, "x")) != text.replace(MARK, "x")
        )

    return _with_texts(tree, found), errors


def _with_texts(tree: Any, changed: Callable[[tuple[str, ...], str], str], path: tuple[str, ...] = ()) -> Any:
    """Return the tree with `changed(path, text)` for each text."""
    if isinstance(tree, dict):
        return {key: _with_texts(value, changed, (*path, str(key))) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_texts(value, changed, (*path, str(index))) for index, value in enumerate(tree)]
    return changed(path, tree) if isinstance(tree, str) else tree
