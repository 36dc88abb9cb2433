"""Filter for privileged responses that reveal their help: they quote the reference's markers or mention a given answer.

A student cannot write such a sentence truthfully, so it must not learn to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from pydantic import BaseModel, ConfigDict, Field, field_validator

_TRUTH = (
    r"(?:final |correct |worked )?(?:solution|answer)\b"
    r"(?! (?:choices?|options?|formats?|sheets?|sets?|spaces?|curves?|paths?|regions?|box|blank|forms?)\b)"
)
_TASK = r"(?:the|this|that|our) (?:original |given |whole |entire )?(?:problem|question|exercise|task)\b"
_HELP = r"(?:(?:the|this|our|your|an?) )?(?:\w+ )?(?:reference|prompt|hint|key|instructions?|teacher|text above)\b"
# What follows where a response speaks of something that it may know: the solution of an equation, a liquid, its own
# result.
_VALUE = r"\$?\d[\d.,/]*\$?(?:$|(?<=[.,])|[;:)])"
_OF_A_PART = rf"(?! (?:of|to|for|from|in|at) (?!{_TASK}|{_HELP}|{_VALUE}))"
_OF_ITS_OWN = (
    r"(?!,? (?:which |that )?(?:we|i)(?:'ve| have| had)? (?:just |already )?"
    r"(?:found|got|obtained|computed|calculated|derived|reached)\b)"
    r"(?! (?:just |already )?(?:found|obtained|computed|calculated|derived)\b)"
)
_OF_A_LIQUID = r"(?! (?:contain(?:s|ed|ing)?\b|has a concentration\b|mixture\b|is (?:an? )?\d+(?:\.\d+)? ?\\?%))"
_KNOWABLE = _OF_A_PART + _OF_ITS_OWN + _OF_A_LIQUID
_REFERENCE = r"reference\b(?! (?:angle|point|line|frame|triangle|plane|direction|level|value|system|axis)\b)"
# At the beginning of a clause, or after a word of knowing: in the middle of one, a liquid is taken from a solution.
_STARTS = "so thus hence then now and but that know see read get have follow follows deduce learn recall clear copied"
_AT_A_START = "|".join(["(?<!.)", r"(?<=[.,;:!?)\]] )", *(rf"(?<=\b{word} )" for word in _STARTS.split())])
_MANNER = (
    rf"(?! (?:by|in) (?!{_HELP}|{_TASK}))(?! as an? )(?! to (?:exist|have|contain|lie|satisfy)\b)"
    r"(?! to be (?:an?|the|in|of|at|unique|positive|negative|real|rational|between)\b)"
    r"(?! (?:implicitly|explicitly|only|up|when|if|for|at|on|through|via|with)\b)"
)
_SHAPE = (
    r"(?! (?:must|should|can|could|may|might|will|has to)\b)"
    r"(?! is (?:an?|in|of|to be|expressed|written|unique|positive|negative|real|rational|between|at)\b)"
)

DEFAULT_PHRASES = (
    rf"\bas given\b(?! (?:in|by|at|for|on) (?!{_HELP}|(?:the|this) {_TRUTH}))",
    rf"\b(?:the|this|that|our|your) (?:provided|supplied|official|reference) {_TRUTH}",
    rf"\b(?:the|this|that|our|your) (?:given|known) {_TRUTH}{_KNOWABLE}",
    rf"\breference {_TRUTH}",
    rf"\b(?:according to|based on|consistent with|matches) (?:the|this) {_TRUTH}{_KNOWABLE}",
    rf"\b(?=from )(?:{_AT_A_START})from (?:the|this) {_TRUTH}{_KNOWABLE}",
    rf"\b(?:according to|based on|consistent with|matches|from) (?:the|this) {_REFERENCE}",
    rf"\b(?:the|this) {_TRUTH}(?: (?:of|to|for) {_TASK})? (?:is|was|has been) (?:already )?"
    rf"(?:given|provided|known|stated)\b{_MANNER}",
    rf"\b(?:we|i) (?:are|were|was|am) (?:told|given)(?: that)? the {_TRUTH}{_KNOWABLE}{_SHAPE}",
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
