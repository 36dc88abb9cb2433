"""JSON of strangers: what is ambiguous or too large is refused, and a number remembers how it was written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megatron_hdpo.data.tasks.values import WrittenFloat

_LONGEST_WHOLE_NUMBER = 4300
"""Digits that Python converts; more would take it time that grows with their square."""


def parse(text: str) -> Any:
    """Return the value of a JSON text; floats are WrittenFloat, NaN and the infinities are kept as floats.

    Raises ValueError (json.JSONDecodeError where there is a place to name) for text that is not JSON, an object with a
    key twice, a whole number of thousands of digits, and lists nested thousands deep.
    """
    try:
        return json.loads(text, parse_float=WrittenFloat, parse_int=_whole, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("its lists or objects are nested too deep to be read") from error


def _whole(digits: str) -> int:
    if len(digits) > _LONGEST_WHOLE_NUMBER:
        raise ValueError(f"it holds a number of {len(digits):,} digits")
    return int(digits)


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return found
