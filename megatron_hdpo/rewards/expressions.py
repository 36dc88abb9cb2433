"""Expressions of answers: parsed as a whole or not at all, and compared by math-verify, whose verdict is then checked.

math-verify decides on algebra, sets and relations. It also calls numbers equal that are not: those that agree in their
first six decimals, 10^-7 and 2*10^-7, and a chain of equations by its last side, `8 = 7` and 7. What it accepts is
looked through for numbers that differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise, product
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.grader import should_treat_as_complex

_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
_NUMBERS_IN_A_ROW = re.compile(r"(?<![_\d])\d+\s+\d")
_MEANINGLESS = (sympy.zoo, sympy.nan)
_PER_CENT = sympy.UnevaluatedExpr(sympy.Rational(1, 100))
"""The per-cent sign, as the parser writes it."""
_DIGITS = 50
_NO_DIFFERENCE = sympy.Float("1e-30")
"""Relative difference of two exact numbers that is one of rounding: they are evaluated to 50 digits."""
_OF_DECIMALS = sympy.Float("1e-9")
"""Relative difference of two decimals, such as 0.3 and what a computer makes of 0.1 + 0.2."""
_OF_FLOATS = sympy.Float("1e-14")
"""Relative error of the parser's decimals, which have 15 digits."""
_ROUNDED_RELATIVE, _ROUNDED = sympy.Float("1.5e-6"), sympy.Float("6e-7")
"""Differences between an exact number and a decimal that rounds it: in the sixth digit and in the sixth decimal."""
_SHOWN_ROUNDED = sympy.Float("0.01")
"""Relative difference between the sides of `10\\pi = 31.4`."""


def parse_whole(text: str) -> Any:
    """Return the expression of a text, None when the parser does not read the whole of it. Raises MemoryError."""
    if (
        text.endswith("\\%") and text.count("%") == 1 and "=" not in text
    ):  # the parser reads it behind plain numbers only
        number = parse_whole(text.removesuffix("\\%").rstrip())
        if isinstance(number, sympy.Expr):
            return sympy.Mul(number, _PER_CENT)
    latex = normalize_latex(text, _NORMALIZATION)
    if not latex or _NUMBERS_IN_A_ROW.search(latex):
        return None
    try:
        expression = latex2sympy(
            latex, is_real=not should_treat_as_complex(latex), convert_degrees=False, normalization_config=None
        )
    except MemoryError:  # the check fails; the answer may be right
        raise
    except Exception:  # the parser raises bare Exceptions for what it does not read, and others in passing
        return None
    return _union_of_cases(expression) if isinstance(expression, sympy.Basic | sympy.MatrixBase) else None


def search(sentence: str) -> Any:
    """Return the last expression that math-verify finds in a sentence, None without one."""
    found = parse(
        sentence,
        (LatexExtractionConfig(), ExprExtractionConfig()),
        fallback_mode="no_fallback",
        parsing_timeout=None,
        raise_on_error=True,
    )
    return found[0] if found else None


def has_value(expression: Any) -> bool:
    """Return whether an expression is neither undefined nor infinite in the complex plane (1/0)."""
    return expression not in _MEANINGLESS


def equal(gold: Any, answer: Any) -> bool:
    """Return whether an answer equals the gold one. Raises any error of math-verify: then the check has failed.

    The letter i is a symbol first, as it may count something, and then the imaginary unit. A percentage equals its
    value and, where the other side is none, the number of per cent.
    """
    readings = product(_of_percentages(gold, answer), _of_percentages(answer, gold))
    return any(_equal(*reading) for reading in readings)


def _equal(gold: Any, answer: Any) -> bool:
    if _accepted(gold, answer):
        return True
    imaginary = _with_imaginary_unit(gold), _with_imaginary_unit(answer)
    return imaginary != (gold, answer) and _accepted(*imaginary)


def _accepted(gold: Any, answer: Any) -> bool:
    if _same_decimal(gold, answer):  # math-verify looks at six decimals, of 10^-7 too
        return True
    # The order matters: math-verify simplifies assignments and intervals on the answer's side only.
    accepted = verify(
        [gold], [answer], timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=isinstance(gold, sympy.Set)
    )
    return bool(accepted) and _holds(answer) and not _differ(_value(gold), _value(answer))


def _of_percentages(expression: Any, other: Any) -> list[Any]:
    """Return an expression as its percentages are read."""
    if not expression.has(_PER_CENT):
        return [expression]
    factors = [sympy.Rational(1, 100)] if other.has(_PER_CENT) else [sympy.Rational(1, 100), sympy.Integer(1)]
    return [expression.xreplace({_PER_CENT: factor}) for factor in factors]


def _with_imaginary_unit(expression: Any) -> Any:
    letters = [symbol for symbol in expression.free_symbols if symbol.name == "i"]
    try:
        return expression.subs(letters[0], sympy.I) if letters else expression
    except TypeError:  # `x > 3 - i` compares what has no order: there it is a letter
        return expression


def _union_of_cases(expression: Any) -> Any:
    """Return `x < 3 or x > 5`, which the parser reads as a set of relations, as the set of the numbers that fit."""
    if not isinstance(expression, sympy.FiniteSet):
        return expression
    if not all(isinstance(case, sympy.core.relational.Relational) and not _is_equation(case) for case in expression):
        return expression
    try:
        return sympy.Or(*expression.args).as_set()
    except (NotImplementedError, TypeError, ValueError):  # of several variables
        return expression


def _is_equation(expression: Any) -> bool:
    return isinstance(expression, sympy.Eq)


def _sides(expression: Any) -> list[Any]:
    """Return the sides of an equation or of a chain of them, else the expression alone."""
    if _is_equation(expression):
        return [expression.lhs, expression.rhs]
    chain = getattr(expression, "_unsorted_args", ())  # of the parser's own And
    if isinstance(expression, sympy.And) and chain and all(map(_is_equation, chain)):
        return [chain[0].lhs, *(equation.rhs for equation in chain)]
    return [expression]


def _value(expression: Any) -> Any:
    return _sides(expression)[-1]


def _holds(answer: Any) -> bool:
    """Return whether the sides of an equation that are numbers are the same number."""
    numbers = [side for side in _sides(answer) if _is_number(side)]
    return all(_close(a, b, rounded=_SHOWN_ROUNDED) for a, b in pairwise(numbers))


def _differ(gold: Any, answer: Any) -> bool:
    """Return whether two expressions are different numbers, or hold different numbers in the same places."""
    if _is_number(gold) and _is_number(answer):
        return not _close(gold, answer)
    if isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase):
        return gold.shape != answer.shape or _any_differ(gold.flat(), answer.flat())
    if isinstance(gold, sympy.Interval) and isinstance(answer, sympy.Interval):
        return _any_differ((gold.start, gold.end), (answer.start, answer.end))
    if isinstance(gold, sympy.FiniteSet | sympy.Tuple) and isinstance(answer, sympy.FiniteSet | sympy.Tuple):
        return len(gold) == len(answer) and _any_differ(_elements(gold, answer), _elements(answer, gold))
    return False


def _any_differ(gold: Iterable[Any], answer: Iterable[Any]) -> bool:
    return any(_differ(a, b) for a, b in zip(gold, answer, strict=True))


def _elements(collection: Any, other: Any) -> list[Any]:
    """Return the elements in the order in which they are compared with those of `other`: of sets, by size."""
    elements = [_value(element) for element in collection.args]
    is_set = isinstance(collection, sympy.FiniteSet) or isinstance(other, sympy.FiniteSet)
    if is_set and all(_is_number(element) and element.is_real for element in elements):
        return sorted(elements, key=lambda element: sympy.N(element, _DIGITS))
    return elements


def _is_number(expression: Any) -> bool:
    """Return whether an expression is a finite number."""
    return (
        isinstance(expression, sympy.Expr)
        and bool(expression.is_number)
        and not expression.has(sympy.oo, -sympy.oo, *_MEANINGLESS)
    )


def _same_decimal(a: Any, b: Any) -> bool:
    """Return whether two numbers, at least one of them a decimal, agree in all digits that the parser keeps."""
    if not (_is_number(a) and _is_number(b) and (a.has(sympy.Float) or b.has(sympy.Float))):
        return False
    x, y = sympy.N(a, _DIGITS), sympy.N(b, _DIGITS)
    return bool(sympy.Abs(x - y) <= _OF_FLOATS * max(sympy.Abs(x), sympy.Abs(y)))


def _close(a: Any, b: Any, rounded: Any = _ROUNDED_RELATIVE) -> bool:
    """Return whether two numbers are equal, a decimal as the rounded form of an exact number."""
    if isinstance(a, sympy.Rational) and isinstance(b, sympy.Rational):
        return bool(a == b)
    x, y = sympy.N(a, _DIGITS), sympy.N(b, _DIGITS)
    difference, size = sympy.Abs(x - y), max(sympy.Abs(x), sympy.Abs(y))
    decimals = a.has(sympy.Float) + b.has(sympy.Float)
    if decimals == 0:
        return bool(difference <= _NO_DIFFERENCE * size) or ((not x or not y) and bool(size < 1e-60))
    if decimals == 2:
        rounded = min(rounded, _OF_DECIMALS) if rounded is _ROUNDED_RELATIVE else rounded
    within = bool(difference <= rounded * size)
    return within and (rounded is _SHOWN_ROUNDED or bool(difference <= max(_ROUNDED, _OF_FLOATS * size)))
