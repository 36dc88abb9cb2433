"""Values that no run can mean, found by the value itself or by the word that ends its key.

A rule here holds for every section, those of tasks and objectives too: a word means the same in all of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from errno import ENOENT, ENOTDIR
from typing import Any

from megatron_hdpo.config.yaml_text import one_line

_INTEGERS = range(-(2**63), 2**63)
_PATHS = {"path", "output", "folder", "replay", "cache_dir", "python"}


@dataclass(frozen=True)
class _Range:
    """Values that a key may have, and why not others."""

    least: float
    most: float
    why: str

    def errors(self, key: str, value: object) -> Iterator[str]:
        if isinstance(value, int | float) and not self.least <= value <= self.most:
            bounds = f"between {self.least:g} and {self.most:g}" if self.least > -math.inf else f"at most {self.most:g}"
            yield f"{key}: must be {bounds}: {self.why} (given: {value:g})"


_REWARD = _Range(1e-6, 1, "rewards go from 0 to 1, so any other threshold is reached always or never")
_DURATION = "nothing waits for longer than three years"
_RANGES = {
    "success_threshold": _REWARD,
    "cliff_threshold": _Range(0, 1 - 1e-6, "rewards go from 0 to 1, so every prompt would be a cliff"),
    "stop_at_reward": _REWARD,
    "temperature": _Range(1e-3, 1e3, "lower ones take the likeliest token, higher ones any, up to rounding"),
    "_s": _Range(-math.inf, 1e8, _DURATION),
    "_seconds": _Range(-math.inf, 1e8, _DURATION),
    "_minutes": _Range(-math.inf, 1.6e6, _DURATION),
}


def unreadable(tree: Any, path: str = "") -> Iterator[str]:
    """Yield an error for every value of a YAML tree that no key can have, whatever its type."""
    for key, value in _children(tree):
        here = _below(path, key)
        if isinstance(tree, dict) and not isinstance(key, str):
            yield f"{here}: a key must be text: quote it"
        elif isinstance(key, str) and (problem := _text_problem(key)):
            yield f"{here}: {problem}"
        if problem := _problem(value):
            yield f"{here}: {problem}"
        yield from unreadable(value, here)


def meaningless(tree: Any, path: str = "") -> Iterator[str]:
    """Yield an error for every value of a recipe's tree that no run can mean, `key.path: why`."""
    for key, value in _children(tree):
        here = _below(path, key)
        for word, allowed in _RANGES.items():
            if key == word or (word.startswith("_") and str(key).endswith(word)):
                yield from allowed.errors(here, value)
        if key in _PATHS and isinstance(value, str):
            yield from _path_errors(here, value)
        yield from meaningless(value, here)
    if isinstance(tree, dict) and {"lr", "min_lr", "weight_decay"} <= tree.keys():
        yield from _optimizer_errors(tree, path)


def _optimizer_errors(optimizer: Mapping[str, Any], path: str) -> Iterator[str]:
    lr, least, decay = optimizer["lr"], optimizer["min_lr"], optimizer["weight_decay"]
    if least > lr:
        yield f"{path}.min_lr: {least:g} is above the peak, {path}.lr={lr:g}: a schedule falls"
    if lr * decay >= 1:
        yield f"{path}.weight_decay: {decay:g} x {path}.lr={lr:g} takes every weight to 0 or beyond in one step"


def _path_errors(key: str, value: str) -> Iterator[str]:
    try:
        os.stat(os.path.expanduser(value))
    except OSError as error:
        if error.errno not in (ENOENT, ENOTDIR):
            yield f"{key}: {one_line(value)} cannot be looked up: {error.strerror}"


def _problem(value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return f"Input should be a finite number (given: {value})"
    if isinstance(value, int) and value not in _INTEGERS:
        return "must fit into 64 bits"
    return _text_problem(value) if isinstance(value, str) else None


def _text_problem(text: str) -> str | None:
    if "\0" in text:
        return "must not contain the character NUL"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "must not contain half a surrogate pair (is it UTF-8?)"
    return None


def _below(path: str, key: object) -> str:
    part = one_line(str(key))
    return f"{path}.{part}" if path else part


def _children(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict):
        yield from tree.items()
    elif isinstance(tree, list):
        yield from enumerate(tree)
