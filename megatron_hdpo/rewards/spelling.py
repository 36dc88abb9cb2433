r"""One spelling for answers that mean the same, before anything parses them. Each rule has its comment.

Rules about what a text means (units, words, characters outside ASCII) have files of their own. A rule never looks for a
number inside of other text: what the parser does not read as a whole is no expression.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_hdpo.rewards.around import bare
from megatron_hdpo.rewards.characters import to_latex
from megatron_hdpo.rewards.units import unit_of, without_units

_Replacement = str | Callable[[re.Match[str]], str]
_FUNCTIONS = "sin|cos|tan|cot|sec|csc"
_GAP = r"(?:\s*(?<!\\)\\[,;:!> ]\s*|~|\{,\})"


def _repeating(found: re.Match[str]) -> str:
    """Return a repeating decimal as a fraction: all digits less those before the period, over nines and zeros."""
    whole, fixed, period = found[1] or "0", found[2], found[3] or found[4]
    above = int(whole + fixed + period) - int(whole + fixed)
    return rf"\frac{{{above}}}{{{'9' * len(period)}{'0' * len(fixed)}}}"


def _radians(found: re.Match[str]) -> str:
    return rf"\{found[1]}(\frac{{{found[2]}\pi}}{{180}})"


_RULES: tuple[tuple[re.Pattern[str], _Replacement], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # Marks around formulas, and the dollar sign of prices.
        (r"\\?\$", ""),
        # Commands that only change how a formula looks.
        (r"\\[hv]?phantom\s*(?:\{[^{}]*\}|\\[A-Za-z]+|[^\\{}])", ""),
        (r"\\(?:[bB]igg?[lrm]?|(?:display|text|script)style|(?:no)?limits|strut|q?quad)(?![A-Za-z])", " "),
        (r"\\([lr])brace(?![A-Za-z])", lambda found: "\\{" if found[1] == "l" else "\\}"),
        (r"\{\\(?:rm|bf|it|sf)\s+([^{}]*)\}", r"\\text{\1}"),
        (r"\\(?:math(?:rm|it|bf|sf|tt)|text(?:normal|bf|it|rm|sf|tt)|emph|[mh]box)(?=\s*\{)", r"\\text"),
        # Numbers and percentages in upright letters.
        (r"\\text\s*\{\s*(-?\d[\d.,]*)\s*\}", r"\1"),
        (r"(?<=\d)\s*\\text\s*\{\s*percent\s*\}", r"\\%"),
        # A letter of a choice.
        (r"(\\text\s*\{[^{}.]*?)\s*\.\s*\}\Z", r"\1}"),
        (r"\A([A-Z])[).:]\Z", r"\1"),
        # Upright e, i, d and T are those of formulas.
        (r"\\text\s*\{\s*([eidT])\s*\}", r" \1 "),
        # Groups of three digits; every other small space is a space.
        (rf"(?<=\d){_GAP}(?=\d{{3}}(?!\d))", ""),
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;:> ]|~(?!=)", " "),
        (r"\A(-?\d{1,3})((?: \d{3})+)\Z", lambda found: found[1] + found[2].replace(" ", "")),
        # Other names of relations, and of the empty set.
        (r"\\(?:leqslant|le)(?![A-Za-z])", r"\\leq "),
        (r"\\(?:geqslant|ge)(?![A-Za-z])", r"\\geq "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}|\A\{\s*\}\Z", r"\\emptyset "),
        # Repeating decimals, e-notation (exact), powers as programs write them.
        (r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{\s*(\d+)\s*\}|(\d))", _repeating),
        (r"(?<![A-Za-z\d.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\d.A-Za-z])", r"(\1 \\cdot 10^{\2})"),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))", r" \\times "),
        (r"\*\*\s*(-?\d+|\([^()]*\)|[A-Za-z])", r"^{\1}"),
        (r"\\?sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])sqrt\s*(\d+|[A-Za-z])", r"\\sqrt{\1}"),
        # Signs in a row, and the i of a number.
        (r"\+\s*-", "-"),
        (r"(?<=\d)i(?![A-Za-z])", " i"),
        # A whole number before a fraction.
        (r"(?<![\d./])(\d+)\s+(\d+)/(\d+)(?![\d./])", r"\1\\frac{\2}{\3}"),
        (r"\\degree(?![A-Za-z])|\{\s*\}\s*\^\s*\{?\s*\\circ\s*\}?", r"^\\circ "),
        # Angles in degrees are radians to a function; elsewhere degrees are a unit.
        (rf"\\({_FUNCTIONS})\s*[({{]?\s*(\d+(?:\.\d+)?)\s*\^\s*(?:\{{\s*\\circ\s*\}}|\\circ)\s*[)}}]?", _radians),
        # Dots stand for elements that are not written.
        (r"\\[lc]?dots(?![A-Za-z])|\.\.\.", r" \\text{dots} "),
        # Lists in words; unions of intervals.
        (r",?\s*\\text\s*\{\s*,?\s*and\s*,?\s*\}\s*", ", "),
        (r",?\s*\\text\s*\{\s*,?\s*or\s*,?\s*\}\s*", " or "),
    )
)
_NAMES = re.compile(
    r"(?<![\\A-Za-z])(pi|theta|alpha|beta|infty|arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|ln|log|exp)"
    r"(?![A-Za-z])"
)
_OR_OF_INTERVALS = re.compile(r"(?<=[)\]])\s*,?\s+or\s+(?=[(\[])")
_NAME_OF_THE_VALUE = re.compile(
    r"(?:[A-Za-z]|\\(?:angle|measuredangle|triangle|overline|text|hat|vec|operatorname)(?![A-Za-z])|_\w|[{}()\s'#|])*="
)
_IS_A_NAME = re.compile(r"\\|[A-Za-z]{4,}|\A\s*=")
_BASE = re.compile(
    r"(?:\(|\\text\s*\{)?\s*((?=[A-Za-z.]*\d)[\dA-Za-z.]+)\s*[)}]?\s*_\s*"
    r"(?:\{\s*(\(?\d+\)?|\\text\s*\{\s*\w+\s*\})\s*\}|(\d+))"
)
_BASES = "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen"
_NOT_A_WORD = re.compile(r"\W")


@dataclass(frozen=True)
class Spelling:
    """An answer in the spelling that is parsed.

    text: without units. written: with them. base: of a number's digits (`52_7` is 52 to the base 7). unit: by one name
    for all its spellings. Both are None where none is written, or none that is known.
    """

    text: str
    written: str
    base: str | None = None
    unit: str | None = None


def spell(answer: str) -> Spelling:
    """Return the one spelling of an answer, in a time proportional to its length."""
    written = to_latex(bare(answer))
    for pattern, replacement in _RULES:
        written = pattern.sub(replacement, " ".join(written.split()))
    written = written.strip()
    if found := _BASE.fullmatch(written):
        return Spelling(found[1], written, base=_base(found[2] or found[3]))
    text = _without_name(without_units(written))
    if "\\infty" in text or "[" in text or "]" in text:
        text = _OR_OF_INTERVALS.sub(r" \\cup ", text)
    return Spelling(" ".join(_NAMES.sub(r"\\\1 ", text).split()), written, unit=unit_of(written))


def _base(written: str) -> str:
    name = _NOT_A_WORD.sub("", written.replace("\\text", "")).lower()
    names = _BASES.split("|")
    return str(names.index(name) + 2) if name in names else name


def _without_name(text: str) -> str:
    r"""Return the value of `\angle ABC = 30`, whose left side no parser reads; `x = 5` and `f(x) = x + 1` stay."""
    found = _NAME_OF_THE_VALUE.match(text)
    if found is None or "=" in text[found.end() :] or not _IS_A_NAME.search(found.group()):
        return text
    return text[found.end() :].strip()
