r"""Units at the end of an answer, which a gold answer may lack: `18 dollars`, `15~\text{cm}^2`, `5 km/h`, `30^\circ`.

What is upright (`\text{m}`) after a value is a unit. What is not is one when it is one of the abbreviations below, or
consists of words of three letters or more behind a space. One letter is never a unit: `2s` and `5 m` are products.
Words that change the value stay: `5 \text{ million}` is 5000000, and `5 halves` is no 5.

Units are left out, but two that are both known and differ (`5 m` and `5 cm`) make two answers. Values are not
converted; powers of a unit and what is counted (`5 apples`) are not compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_POWERS_OF_TEN: Mapping[str, int] = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_CHANGES_THE_VALUE = re.compile(
    r"\b(?:hal(?:f|ves)|(?:third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth|dozen|score|"
    r"(?:m|b|tr)illion|thousand|hundred)s?|squared|cubed|factorial|percent(?:age)?|pct|and|or|plus|minus|times|over|"
    r"divided|root|mod|modulo|base|choose|not|more|less|fewer|than|least|most|from|between|for|if|where|when|pi|"
    r"infin\w+|infty|sqrt|sin|cos|tan|cot|log|exp|am|pm|a\.m|p\.m|one|two|three|four|five|six|seven|eight|"
    r"nine|ten|many|dots)\b",
    re.IGNORECASE,
)
_ABBREVIATED = (
    "[ckm]?m/(?:s|h|hr|sec|min)|ft/s|mi/h|m/s|[cdkm]m|[km]g|m[lL]|lbs?|oz|ft|yd|mi|in|hrs?|yrs?|mins?|secs?|mph|kph|kmh"
)
_NAMES_OF_UNITS = (
    "mm millimeter millimetre",
    "cm centimeter centimetre",
    "m meter metre",
    "km kilometer kilometre",
    "in inch inche",
    "ft foot feet",
    "yd yard",
    "mi mile",
    "mg milligram",
    "g gram",
    "kg kilogram",
    "lb pound",
    "oz ounce",
    "ml milliliter millilitre",
    "l liter litre",
    "gallon",
    "sec second",
    "min minute",
    "h hr hour",
    "day",
    "week",
    "month",
    "yr year",
    "dollar",
    "cent",
)
_UNIT_OF_NAME = {name: names.split()[0] for names in _NAMES_OF_UNITS for name in names.split()}
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|\d))?"
_UPRIGHT = re.compile(r"\\text\s*\{([^{}]*)\}" + _POWER + r"\s*$")
_SHORT = re.compile(rf"(?:(?<=[\d)}}])|(?<=\s))(?:{_ABBREVIATED}){_POWER}\s*$")
_WORDS = re.compile(rf"(?<=\s)[A-Za-z]{{3,}}(?:\s+[A-Za-z]{{3,}}){{0,5}}{_POWER}\s*$")
_TEN = re.compile(rf"(?:\\text\s*\{{\s*|(?<=\s))({'|'.join(_POWERS_OF_TEN)})\s*\}}?\s*$")
_DEGREES = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)(?:\s*[CF]\s*$)?")
_ENDS_A_VALUE = re.compile(r"[\dA-Za-z)}\]%!]\Z")
_NUMBER_ENDS = re.compile(r"[\d)}]\Z")


def without_units(text: str) -> str:
    r"""Return the text without its units and degrees, and with words for powers of ten as `\cdot 10^{n}`."""
    text = _DEGREES.sub("", text)
    for pattern in (_UPRIGHT, _SHORT, _WORDS):
        text = _without(pattern, text)
    return _with_powers_of_ten(text)


def unit_of(text: str) -> str | None:
    """Return the unit at the end of a text, by one name for all its spellings; None for one that is not known."""
    for pattern in (_UPRIGHT, _SHORT, _WORDS):
        if found := pattern.search(text):
            name = re.sub(r"\\text|\^.*|[^A-Za-z ]", "", found[0]).lower().strip()
            name = name.removeprefix("square ").removeprefix("cubic ")
            return _UNIT_OF_NAME.get(name) or _UNIT_OF_NAME.get(name.removesuffix("s"))
    return None


def _without(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    if found is None:
        return text
    value, unit = text[: found.start()].rstrip(), found[0].replace("\\text", "")
    ends = _ENDS_A_VALUE if pattern is _UPRIGHT else _NUMBER_ENDS
    is_unit = re.search("[A-Za-z]", unit) and not _CHANGES_THE_VALUE.search(unit)
    return value if is_unit and ends.search(value) else text


def _with_powers_of_ten(text: str) -> str:
    found = _TEN.search(text)
    if found is None or not _NUMBER_ENDS.search(value := text[: found.start()].rstrip()):
        return text
    return f"{value} \\cdot 10^{{{_POWERS_OF_TEN[found[1]]}}}"
