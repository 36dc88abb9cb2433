r"""Other spellings of numbers: one function a kind (see `_respellings`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import isqrt

from _answer_values import is_number

Respelling = Callable[[str], Iterator[str]]

_INTEGER = re.compile(r"(-?)(\d+)")
_TIMES_TEN = re.compile(r"(\d+\.\d+) \\times 10\^\{(-?\d+)\}")
_DECIMAL = re.compile(r"(-?)(\d*)\.(\d+)")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_MIXED = re.compile(r"(\d+)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_PERCENTAGE = re.compile(r"(\d+(?:\.\d+)?)\\%")
_MONEY = re.compile(r"\\\$(\d+(?:\.\d+)?)")
_ROOT = re.compile(r"(\d*)\\sqrt\{(\d+)\}")
_POWER = re.compile(r"(\d+)\^\{(\d+)\}")
_WIDE = str.maketrans("0123456789", "".join(chr(0xFF10 + digit) for digit in range(10)))
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_HALVES = {(1, 2): "½", (1, 4): "¼", (3, 4): "¾", (1, 3): "⅓", (2, 3): "⅔", (1, 5): "⅕", (1, 8): "⅛"}


def _thousands(text: str) -> Iterator[str]:
    if (found := _INTEGER.fullmatch(text)) and len(found[2]) > 3:
        for mark in (
            ",",
            r"\,",
            "{,}",
            r"{,}\!",
            r",\!",
            "\N{THIN SPACE}",
            "\N{NARROW NO-BREAK SPACE}",
            "~",
            " ",
            r"\;",
        ):
            yield f"{int(text):,}".replace(",", mark)


def _zeros(text: str) -> Iterator[str]:
    if _INTEGER.fullmatch(text):
        yield from (f"{text}.0", f"{text}.00", f"{text}.")
    if found := _DECIMAL.fullmatch(text):
        yield f"{text}0"
        if not int(found[2] or 0):
            yield f"{found[1]}.{found[3]}"


def _signs(text: str) -> Iterator[str]:
    if is_number(text) and text[0].isdigit():
        yield f"+{text}"
    if text.startswith("-") and is_number(text):
        for dash in "\N{MINUS SIGN}\N{EN DASH}\N{FULLWIDTH HYPHEN-MINUS}\N{NON-BREAKING HYPHEN}":
            yield dash + text[1:]
        yield f"- {text[1:]}"


def _digits_of_other_scripts(text: str) -> Iterator[str]:
    if _INTEGER.fullmatch(text) or _DECIMAL.fullmatch(text):
        yield text.translate(_WIDE)


def _names_of_fractions(text: str) -> Iterator[str]:
    if "\\frac" in text:
        yield from (text.replace("\\frac", name) for name in ("\\dfrac", "\\tfrac", "\\cfrac"))


def _ratios(text: str) -> Iterator[str]:
    if found := _FRACTION.fullmatch(text):
        sign, above, below = found.groups()
        yield from (f"{sign}{above}/{below}", f"{sign}{above} / {below}", rf"{sign}{above} \div {below}")
        yield from (
            rf"{sign}{{{above} \over {below}}}",
            rf"{sign}({above})/({below})",
            f"{sign}{above}\N{DIVISION SLASH}{below}",
        )
        if sign:
            yield from (rf"\frac{{-{above}}}{{{below}}}", rf"\frac{{{above}}}{{-{below}}}")
        if len(above) == len(below) == 1:
            yield from (rf"{sign}\frac{above}{below}", rf"{sign}\frac {above} {below}")
        if character := _HALVES.get((int(above), int(below))):
            yield sign + character


def _unreduced(text: str) -> Iterator[str]:
    if found := _FRACTION.fullmatch(text):
        yield rf"{found[1]}\frac{{{3 * int(found[2])}}}{{{3 * int(found[3])}}}"


def _fractions_as_decimals(text: str) -> Iterator[str]:
    if (found := _FRACTION.fullmatch(text)) and int(found[3]):
        value = Fraction(int(found[2]), int(found[3]))
        if (value * 10**6).denominator == 1:
            yield found[1] + f"{float(value):.6f}".rstrip("0").rstrip(".")
            yield found[1] + f"{float(100 * value):.6f}".rstrip("0").rstrip(".") + r"\%"
        else:
            yield f"{found[1]}{float(value):.8f}"
            whole, fixed, period = _decimal_digits(value)
            yield rf"{found[1]}{whole}.{fixed}\overline{{{period}}}"


def _decimal_digits(value: Fraction) -> tuple[int, str, str]:
    whole, rest = divmod(value.numerator, value.denominator)
    seen: dict[int, int] = {}
    digits = ""
    while rest not in seen:
        seen[rest] = len(digits)
        digit, rest = divmod(10 * rest, value.denominator)
        digits += str(digit)
    return whole, digits[: seen[rest]], digits[seen[rest] :]


def _decimals_as_fractions(text: str) -> Iterator[str]:
    if found := _DECIMAL.fullmatch(text):
        value = abs(Fraction(text))
        yield rf"{found[1]}\frac{{{value.numerator}}}{{{value.denominator}}}"
        yield f"{found[1]}{value.numerator}/{value.denominator}"


def _mixed_numbers(text: str) -> Iterator[str]:
    if (found := _MIXED.fullmatch(text)) and int(found[3]):
        whole, above, below = map(int, found.groups())
        yield rf"\frac{{{whole * below + above}}}{{{below}}}"
        yield from (f"{whole} {above}/{below}", rf"{whole} \dfrac{{{above}}}{{{below}}}")
        yield from (rf"{whole}\,\frac{{{above}}}{{{below}}}", rf"{whole}\tfrac{{{above}}}{{{below}}}")
        yield rf"{whole} + \frac{{{above}}}{{{below}}}"
    elif (found := _FRACTION.fullmatch(text)) and not found[1] and int(found[2]) > int(found[3]) > 1:
        whole, above = divmod(int(found[2]), int(found[3]))
        if above:
            yield from (rf"{whole}\frac{{{above}}}{{{found[3]}}}", f"{whole} {above}/{found[3]}")


def _percentages(text: str) -> Iterator[str]:
    if found := _PERCENTAGE.fullmatch(text):
        yield from (f"{found[1]}%", rf"{found[1]} \%", f"{found[1]} percent", rf"{found[1]}\text{{ percent}}", found[1])
        yield rf"\frac{{{Fraction(found[1]).numerator}}}{{{100 * Fraction(found[1]).denominator}}}"
        yield f"{float(Fraction(found[1]) / 100):.8f}".rstrip("0").rstrip(".")


def _money(text: str) -> Iterator[str]:
    if found := _MONEY.fullmatch(text):
        yield from (f"${found[1]}", found[1], f"{found[1]} dollars", rf"{found[1]}\text{{ dollars}}")
        yield from (rf"\text{{\${found[1]}}}", f"{found[1]} USD", rf"\${float(found[1]):,.2f}", rf"\$ {found[1]}")


def _roots(text: str) -> Iterator[str]:
    if found := _ROOT.fullmatch(text):
        before, radicand = found.groups()
        yield from (rf"{before}√{radicand}", f"{before}*sqrt({radicand})" if before else f"sqrt({radicand})")
        yield rf"{before}\sqrt[2]{{{radicand}}}"
        times = rf"{before} \cdot " if before else ""
        yield from (
            rf"{times}{radicand}^{{1/2}}",
            rf"{times}{radicand}^{{\frac{{1}}{{2}}}}",
        )
        yield rf"\sqrt{{{int(before or 1) ** 2 * int(radicand)}}}"
        if len(radicand) == 1:
            yield from (rf"{before}\sqrt{radicand}", rf"{before}\sqrt {radicand}")
        if before:
            yield rf"{before} \cdot \sqrt{{{radicand}}}"
    elif (found := _INTEGER.fullmatch(text)) and not found[1] and 1 < int(text) < 1000:
        yield rf"\sqrt{{{int(text) ** 2}}}"


def _powers(text: str) -> Iterator[str]:
    if found := _POWER.fullmatch(text):
        base, exponent = found.groups()
        yield from (f"{base}**{exponent}", base + exponent.translate(_RAISED), str(int(base) ** int(exponent)))
        yield from (f"{base}^({exponent})", rf"({base})^{{{exponent}}}", f"{base}^ {{{exponent}}}")
    elif (found := _INTEGER.fullmatch(text)) and not found[1] and 1 < isqrt(int(text)) ** 2 == int(text):
        yield f"{isqrt(int(text))}^2"


def _times_ten(text: str) -> Iterator[str]:
    if found := _TIMES_TEN.fullmatch(text):
        digits, power = found.groups()
        yield from (f"{digits}e{power}", f"{digits}E{int(power):+03d}", rf"{digits} \cdot 10^{{{power}}}")
        yield from (
            f"{digits}\N{MULTIPLICATION SIGN}10^{power}"
            if len(power) == 1
            else f"{digits}\N{MULTIPLICATION SIGN}10^{{{power}}}",
            f"{digits}*10**{power}",
        )
        yield from (f"{digits} x 10^{{{power}}}", f"{Fraction(digits) * Fraction(10) ** int(power)}")
    elif (found := _INTEGER.fullmatch(text)) and not found[1] and len(text) > 3:
        yield rf"{text[0]}.{text[1:]} \times 10^{{{len(text) - 1}}}"
        yield from (f"{text[0]}.{text[1:]}e{len(text) - 1}", rf"{text[0]}.{text[1:]} \cdot 10^{{{len(text) - 1}}}")


def _names_of_pi(text: str) -> Iterator[str]:
    if re.search(r"\d\\pi", text) and "\\frac" not in text:
        yield from (text.replace("\\pi", name) for name in ("π", "*pi", r"\cdot\pi", r" \pi "))
    elif "\\pi" in text:
        yield text.replace("\\pi", "π")


def _order_of_sums(text: str) -> Iterator[str]:
    if (found := re.fullmatch(r"(-?[^+\-,=()\[\]<>^]+) ([+-]) ([^+\-,=()\[\]<>^]+)", text)) and is_number(text):
        yield f"{found[3] if found[2] == '+' else '-' + found[3]} {'' if found[1][0] == '-' else '+'} {found[1]}"
    if is_number(text) and re.search(" [+-] ", text):
        yield text.replace(" ", "")


def _names_of_i(text: str) -> Iterator[str]:
    if re.fullmatch(r"-?\d+ [+-] \d+i", text):
        yield from (text.replace("i", r"\mathrm{i}"), text.replace("i", r" \cdot i"), text.replace("i", "*i"))


FUNCTIONS: tuple[Respelling, ...] = (
    _thousands,
    _zeros,
    _signs,
    _digits_of_other_scripts,
    _names_of_fractions,
    _ratios,
    _unreduced,
    _fractions_as_decimals,
    _decimals_as_fractions,
    _mixed_numbers,
    _percentages,
    _money,
    _roots,
    _powers,
    _times_ten,
    _names_of_pi,
    _order_of_sums,
    _names_of_i,
)
