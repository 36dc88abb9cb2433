"""Values of a config.json with their types checked: `"false"` is not false, and `"32"` is no size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_LARGEST_SIZE = 2**31


@dataclass(frozen=True)
class ConfigValues:
    """Reader of the values in a parsed config.json.

    refuse: makes the error for a reason. Missing keys raise KeyError.
    """

    config: Mapping[str, Any]
    refuse: Callable[[str], Exception]

    def size(self, key: str) -> int:
        """Return a whole number of at least 1."""
        return self._size(key, self.config[key])

    def size_or(self, key: str, default: int) -> int:
        """Return a whole number of at least 1, the default where the key is missing or null."""
        value = self.config.get(key)
        return default if value is None else self._size(key, value)

    def positive(self, key: str) -> float:
        """Return a finite number above 0."""
        return self.positive_value(key, self.config[key])

    def positive_value(self, key: str, value: Any) -> float:
        """Return the value as a finite number above 0; key: for the message."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise self.refuse(f"{key}={value!r} must be a finite number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return a truth value, False where the key is missing or null."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(f"{key}={value!r} must be true or false")
        return bool(value)

    def names(self, key: str) -> list[str]:
        """Return a list of texts, empty where the key is missing or null."""
        value = self.config.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise self.refuse(f"{key}={value!r} must be a list of texts")
        return value or []

    def section(self, key: str) -> dict[str, Any]:
        """Return an object, empty where the key is missing or null."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(f"{key}={value!r} must be an object")
        return value or {}

    def _size(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _LARGEST_SIZE:
            raise self.refuse(f"{key}={_short(value)} must be a whole number from 1 to {_LARGEST_SIZE - 1}")
        return value


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, float) else repr(value)
    return text if len(text) < 60 else f"{text[:60]}..."
