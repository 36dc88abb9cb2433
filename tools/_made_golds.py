"""Gold answers that are made up, of every kind that sets of problems hold: one function a kind, drawn by a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from math import gcd
from random import Random

WORDS = ("Monday", "Evelyn", "blue", "parabola", "ellipse", "isosceles", "Softball", "never", "even", "north")
MEASURES = ("cm", "m", "km", "kg", "inches", "feet", "miles", "hours", "minutes", "dollars")
UNITS = (*MEASURES, "apples", "square feet")


@dataclass(frozen=True)
class NamedGold:
    """A gold answer and the name of its kind."""

    kind: str
    text: str


def made_golds(count: int, seed: int) -> list[NamedGold]:
    """Return gold answers, the same number of each kind as far as `count` allows, without duplicates."""
    rng = Random(seed)
    found: dict[str, NamedGold] = {}
    for kind in cycle(KINDS):
        text = KINDS[kind](rng)
        found.setdefault(text, NamedGold(kind, text))
        if len(found) == count:
            return list(found.values())
    raise AssertionError("endless")


def _integer(rng: Random) -> str:
    return str(rng.randint(2, 999))


def _large_integer(rng: Random) -> str:
    return str(rng.randint(1000, 10 ** rng.randint(5, 12)))


def _negative(rng: Random) -> str:
    return str(-rng.randint(1, 5000))


def _decimal(rng: Random) -> str:
    return f"{rng.randint(0, 300)}.{rng.randint(1, 99):02d}"


def _fraction(rng: Random) -> str:
    below = rng.randint(2, 40)
    above = rng.choice([n for n in range(1, 60) if gcd(n, below) == 1])
    return rf"{rng.choice(['', '', '-'])}\frac{{{above}}}{{{below}}}"


def _mixed_number(rng: Random) -> str:
    below = rng.randint(2, 12)
    above = rng.choice([n for n in range(1, below) if gcd(n, below) == 1])
    return rf"{rng.randint(1, 20)}\frac{{{above}}}{{{below}}}"


def _percentage(rng: Random) -> str:
    return rf"{rng.choice([rng.randint(1, 400), rng.randint(1, 99) + 0.5])}\%"


def _money(rng: Random) -> str:
    return rng.choice([rf"\${rng.randint(2, 9000)}", rf"\${rng.randint(1, 90)}.{rng.randint(1, 99):02d}"])


def _radical(rng: Random) -> str:
    return rf"{rng.choice(['', rng.randint(2, 12)])}\sqrt{{{rng.choice([2, 3, 5, 6, 7, 10, 11, 13, 15, 21, 30])}}}"


def _sum_with_radical(rng: Random) -> str:
    return rf"{rng.randint(1, 12)} {rng.choice('+-')} {_radical(rng)}"


def _fraction_with_radical(rng: Random) -> str:
    return rf"\frac{{{_radical(rng)}}}{{{rng.randint(2, 9)}}}"


def _power(rng: Random) -> str:
    return f"{rng.choice([2, 3, 5, 7, 10])}^{{{rng.randint(3, 40)}}}"


def _small_power(rng: Random) -> str:
    return rf"\frac{{1}}{{{rng.choice([2, 3, 5])}^{{{rng.randint(5, 99)}}}}}"


def _times_ten(rng: Random) -> str:
    return rf"{rng.randint(1, 9)}.{rng.randint(1, 9)} \times 10^{{{rng.choice([-12, -7, -3, 4, 6, 9, 23])}}}"


def _multiple_of_pi(rng: Random) -> str:
    return rng.choice([rf"{rng.randint(2, 60)}\pi", rf"\frac{{{rng.choice([1, 3, 5, 7])}\pi}}{{{rng.choice([2, 4])}}}"])


def _complex_number(rng: Random) -> str:
    return f"{rng.choice(['', '-'])}{rng.randint(1, 20)} {rng.choice('+-')} {rng.randint(2, 20)}i"


def _repeating_decimal(rng: Random) -> str:
    return rf"{rng.randint(0, 3)}.\overline{{{rng.randint(1, 98):02d}}}"


def _interval(rng: Random) -> str:
    low = rng.randint(-20, 20)
    return f"{rng.choice('([')}{low}, {low + rng.randint(1, 20)}{rng.choice(')]')}"


def _half_line(rng: Random) -> str:
    end = rng.randint(-20, 20)
    return rng.choice([rf"(-\infty, {end}{rng.choice(')]')}", rf"{rng.choice('([')}{end}, \infty)"])


def _union(rng: Random) -> str:
    end = rng.randint(-20, 20)
    return rf"(-\infty, {end}{rng.choice(')]')} \cup {rng.choice('([')}{end + rng.randint(1, 20)}, \infty)"


def _set(rng: Random) -> str:
    return rf"\{{{', '.join(map(str, sorted(rng.sample(range(-9, 30), rng.randint(2, 5)))))}\}}"


def _list(rng: Random) -> str:
    return ", ".join(map(str, sorted(rng.sample(range(-9, 99), rng.randint(2, 5)))))


def _list_of_roots(rng: Random) -> str:
    return rf"{rng.randint(-9, 9)}, \sqrt{{{rng.choice([2, 3, 5, 7])}}}, {_fraction(rng)}"


def _pair(rng: Random) -> str:
    return f"({rng.randint(-20, 20)}, {rng.randint(21, 40)})"


def _point_with_fractions(rng: Random) -> str:
    return rf"\left( {_fraction(rng)}, {rng.randint(-9, 9)}, \frac{{\pi}}{{{rng.randint(2, 6)}}} \right)"


def _matrix(rng: Random) -> str:
    a, b, c, d = rng.sample(range(-9, 20), 4)
    return rng.choice([rf"{a} & {b} \\ {c} & {d}", rf"{a} \\ {b} \\ {c}"]).join(
        (r"\begin{pmatrix} ", r" \end{pmatrix}")
    )


def _equation(rng: Random) -> str:
    return f"y = {rng.randint(2, 9)}x {rng.choice('+-')} {rng.randint(1, 20)}"


def _polynomial(rng: Random) -> str:
    return f"{rng.choice(['', 2, 3, 5])}x^2 {rng.choice('+-')} {rng.randint(2, 20)}x + {rng.randint(1, 50)}"


def _product_of_letters(rng: Random) -> str:
    return f"{rng.randint(2, 9)}{''.join(rng.sample('abcmnpqrxyz', 2))}"


def _unit(rng: Random) -> str:
    return rf"{rng.randint(2, 900)} \text{{ {rng.choice(UNITS)}}}"


def _degrees(rng: Random) -> str:
    return rf"{rng.randint(2, 359)}^\circ"


def _base(rng: Random) -> str:
    base = rng.randint(3, 9)
    return f"{rng.randint(1, base - 1)}{rng.randrange(base)}{rng.randrange(base)}_{base}"


def _letter(rng: Random) -> str:
    return rng.choice([r"\text{({})}", "{}", r"\text{{}}"]).replace("{}", rng.choice("ABCDEFGH"))


def _word(rng: Random) -> str:
    return rng.choice([r"\text{{{}}}", "{}"]).format(rng.choice(WORDS))


def _list_of_words(rng: Random) -> str:
    return rf"\text{{{', '.join(rng.sample(WORDS, rng.randint(2, 3)))}}}"


def _points(rng: Random) -> str:
    return "".join(rng.sample("ABCDEFGH", 4))


def _inequality(rng: Random) -> str:
    return rf"x {rng.choice(['<', '>', chr(92) + 'leq', chr(92) + 'geq'])} {rng.randint(-30, 30)}"


_FUNCTIONS: tuple[Callable[[Random], str], ...] = (
    _integer,
    _large_integer,
    _negative,
    _decimal,
    _fraction,
    _mixed_number,
    _percentage,
    _money,
    _radical,
    _sum_with_radical,
    _fraction_with_radical,
    _power,
    _small_power,
    _times_ten,
    _multiple_of_pi,
    _complex_number,
    _repeating_decimal,
    _interval,
    _half_line,
    _union,
    _set,
    _list,
    _list_of_roots,
    _pair,
    _point_with_fractions,
    _matrix,
    _equation,
    _polynomial,
    _product_of_letters,
    _unit,
    _degrees,
    _base,
    _letter,
    _word,
    _list_of_words,
    _points,
    _inequality,
)
KINDS: Mapping[str, Callable[[Random], str]] = {function.__name__[1:]: function for function in _FUNCTIONS}
