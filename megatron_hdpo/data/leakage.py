"""Filter for privileged responses that reveal their help: they quote the reference's markers or mention a given answer.

A student cannot write such a sentence truthfully, so it must not learn to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from pydantic import BaseModel, ConfigDict, Field, field_validator

_GIVEN = r"(?:provided|given|supplied|known|official|reference)"
_TRUTH = r"(?:final |correct |worked )?(?:solution|answer)(?! (?:choices?|options?|format|sheet))"

DEFAULT_PHRASES = (
    r"\bas given\b(?! (?:in|by) (?:the|this) (?:problem|question|statement|equation|diagram|figure|table))",
    rf"\b(?:the|this|that|our|your) {_GIVEN} {_TRUTH}\b",
    rf"\breference {_TRUTH}\b",
    rf"\b(?:according to|based on|consistent with|matches|from) (?:the|this) (?:reference|{_TRUTH})\b",
    rf"\b(?:the|this) {_TRUTH} (?:is|was|has been) (?:already )?(?:given|provided|known|stated)\b",
    rf"\b(?:we|i) (?:are|were|was|am) (?:told|given)(?: that)? the {_TRUTH}\b",
    r"\bthe reference (?:says|states|shows|gives|above)\b",
)


class LeakageConfig(BaseModel):
    """Rules that decide which privileged responses count as leaked."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    enabled: bool = Field(True, description="Drop privileged responses that give their help away.")
    phrases: list[str] = Field(
        default_factory=lambda: list(DEFAULT_PHRASES),
        description="Regular expressions, searched without regard to case; spaces stand for any white space.",
    )

    @field_validator("phrases")
    @classmethod
    def _compile(cls, phrases: list[str]) -> list[str]:
        for phrase in phrases:
            try:
                re.compile(phrase)
            except re.error as error:
                raise ValueError(f"{phrase!r} is not a regular expression: {error}") from error
        return phrases


def find_leak(response: str, markers: Sequence[str] = (), phrases: Sequence[str] = DEFAULT_PHRASES) -> str | None:
    """Return the first piece of `response` that reveals the help; None when there is none.

    markers: literal texts of the privileged prompt. phrases: regular expressions. White space and case are ignored in
    both.
    """
    text = " ".join(response.split())
    match = _pattern(tuple(markers), tuple(phrases)).search(text)
    return match.group() if match else None


@lru_cache(maxsize=16)
def _pattern(markers: tuple[str, ...], phrases: tuple[str, ...]) -> re.Pattern[str]:
    literal = [re.escape(" ".join(marker.split())) for marker in markers if marker.strip()]
    alternatives = [*literal, *phrases] or [r"(?!)"]
    return re.compile("|".join(f"(?:{alternative})" for alternative in alternatives), re.IGNORECASE)
