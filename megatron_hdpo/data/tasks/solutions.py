r"""Worked solutions for reasoning-gym sets, most of which have none.

A builder takes an entry of its set (question, answer, metadata) and returns a short solution that ends in
`\boxed{answer}`, or None when it cannot. `@solution_builder("set")` adds one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal, DivisionByZero, InvalidOperation
from typing import Any

from megatron_hdpo.data.tasks.knights_logic import holds

Entry = Mapping[str, Any]
SolutionBuilder = Callable[[Entry], str | None]

SOLUTION_BUILDERS: dict[str, SolutionBuilder] = {}

_NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
_EQUATION = re.compile(rf"({_NUMBER}(?:\s*[-+*/]\s*{_NUMBER})+)\s*=\s*({_NUMBER})")
_TERM = re.compile(rf"\s*([-+*/]?)\s*({_NUMBER})")


def solution_builder(dataset: str) -> Callable[[SolutionBuilder], SolutionBuilder]:
    """Register the decorated function as the builder of worked solutions for a reasoning-gym set."""

    def register(builder: SolutionBuilder) -> SolutionBuilder:
        SOLUTION_BUILDERS[dataset] = builder
        return builder

    return register


def boxed(answer: str) -> str:
    """Return the answer in the form that responses should have."""
    return "\\boxed{" + answer + "}"


@solution_builder("chain_sum")
def chain_sum(entry: Entry) -> str:
    """Return running totals, one line per operation."""
    first, *rest = entry["metadata"]["expression"].split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        new_total = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {new_total}")
        total = new_total
    return "\n".join([*lines, boxed(entry["answer"])])


@solution_builder("gsm_symbolic")
def gsm_symbolic(entry: Entry) -> str | None:
    """Return the true equations of the entry's chain of thought if they lead to the answer, else its lines."""
    thought = entry["metadata"].get("answer_cot")
    if not thought:
        return None
    text = thought.partition("####")[0].strip()
    equations = list(dict.fromkeys(_true_equations(text)))
    if equations and _same_number(equations[-1].rpartition("= ")[2], entry["answer"]):
        return "\n".join([*equations, boxed(entry["answer"])])
    return f"{text}\n{boxed(entry['answer'])}"


@solution_builder("knights_knaves")
def knights_knaves(entry: Entry) -> str:
    """Return everybody's role with the truth of their statement, which shows that the assignment is right."""
    metadata = entry["metadata"]
    names, truth, terms = metadata["names"], metadata["solution"], metadata["knight_knave_terms"]
    lines = []
    for name, is_knight, statement in zip(names, truth, metadata["statements"], strict=True):
        said = "true" if holds(statement, truth) else "false"
        role = terms["a_knight"] if is_knight else terms["a_knave"]
        lines.append(f"{name} is {role}: the statement is {said}.")
    return "\n".join([*lines, boxed(entry["answer"].rstrip("."))])


def _true_equations(text: str) -> list[str]:
    """Return the equations `a op b ... = c` of a text that hold, without units and currencies."""
    plain = re.sub(r"[€$£]", "", text.replace("\N{MULTIPLICATION SIGN}", "*"))
    plain = re.sub(r"(?<=\d)\s*x\s*(?=\d)", " * ", plain)
    plain = re.sub(r"(?<=\d)\s*/?[A-Za-z][A-Za-z' -]*(?:/[a-z]+)?(?=\s*[-+*/=])", "", plain)
    return [f"{_spaced(left)} = {right}" for left, right in _EQUATION.findall(plain) if _is_true(left, right)]


def _spaced(expression: str) -> str:
    return " ".join(part for term in _TERM.findall(expression) for part in term if part)


def _is_true(left: str, right: str) -> bool:
    try:
        return _evaluate(left) == Decimal(right.replace(",", ""))
    except (DivisionByZero, InvalidOperation):
        return False


def _evaluate(expression: str) -> Decimal:
    """Return the value of numbers joined by + - * /, products first; `expression` is the left side of an equation."""
    terms: list[Decimal] = []
    for operator, number in _TERM.findall(expression):
        value = Decimal(number.replace(",", ""))
        if operator in ("*", "/"):
            terms[-1] = terms[-1] * value if operator == "*" else terms[-1] / value
        else:
            terms.append(-value if operator == "-" else value)
    return sum(terms, Decimal(0))


def _same_number(left: str, right: str) -> bool:
    try:
        return Decimal(left.replace(",", "")) == Decimal(right.replace(",", ""))
    except InvalidOperation:
        return False
