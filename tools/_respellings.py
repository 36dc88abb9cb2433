r"""Other spellings of an answer that mean the same: one function a kind, which yields the spellings that apply.

A kind looks at the text alone, and applies only to texts whose form it knows (its precondition), so that it also works
on the golds of real sets. Nothing here uses the rules of the judge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import _number_respellings
from _answer_values import is_number, split
from _number_respellings import Respelling

_INTEGER = re.compile(r"(-?)(\d+)")
_UNIT = re.compile(r"(\d+) ?\\text\{ ?([A-Za-z ]+)\}")
_DEGREES = re.compile(r"(\d+)\^\\circ")
_BASE = re.compile(r"(\d+)_\{?(\d)\}?")
_LETTER = re.compile(r"(?:\\text\{)?\(?([A-Z])\)?\}?")
_WORDS = re.compile(r"(?:\\text\{)?([A-Za-z]{4,}(?:, [A-Za-z]{4,})*)\}?")
_ENDS = re.compile(r"([(\[])(-?\d+|-\\infty), ?(-?\d+|\\infty)([)\]])")
_SPLIT = re.compile(r"-?\d+(?:, -?\d+)+")
_MIRRORED = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}


def _formula_marks(text: str) -> Iterator[str]:
    yield from (f"${text}$", rf"\({text}\)", rf"\[{text}\]", f"$${text}$$")


def _bold(text: str) -> Iterator[str]:
    yield f"**{text}**"
    if "\\text" not in text and "\\begin" not in text:
        yield from (rf"\mathbf{{{text}}}", rf"\boldsymbol{{{text}}}", rf"\bm{{{text}}}")


def _end_of_sentence(text: str) -> Iterator[str]:
    yield from (f"{text}.", f"{text}\\\\", f"{text} .")


def _looks(text: str) -> Iterator[str]:
    yield from (rf"\displaystyle {text}", rf"\large {text}", rf"{{{text}}}", rf"\quad {text}")


def _spaces_around(text: str) -> Iterator[str]:
    yield from (f"  {text} ", rf"\, {text} \,", f"~{text}~", rf"\;{text}\;", f"\n{text}\n")


def _brackets(text: str) -> Iterator[str]:
    plain = re.sub(r"\\(?:left|right)\s?(?=[()\[\]])", "", text)
    if re.search(r"[()\[\]]", plain) and "\\text" not in text:
        yield plain
        for left, right in ((r"\left", r"\right"), (r"\bigl", r"\bigr"), (r"\big", r"\big")):
            yield re.sub(r"[)\]]", lambda found, right=right: right + found[0], _opened(plain, left))


def _opened(text: str, left: str) -> str:
    return re.sub(r"(?<!\\sqrt)[(\[]", lambda found: left + found[0], text)


def _value_with_name(text: str) -> Iterator[str]:
    if is_number(text) and not re.search(r"[A-Za-z]", re.sub(r"\\(?:[dt]?frac|sqrt|pi)", "", text)):
        yield from (f"x = {text}", f"n={text}", f"f(2) = {text}", rf"\text{{Area}} = {text}", f"|AB| = {text}")


def _upright(text: str) -> Iterator[str]:
    if _INTEGER.fullmatch(text):
        yield from (rf"\text{{{text}}}", rf"\mathrm{{{text}}}", rf"\textbf{{{text}}}", rf"\textrm{{{text}}}")


def _sets(text: str) -> Iterator[str]:
    inner = text.removeprefix("\\{").removesuffix("\\}")
    if inner != text and _SPLIT.fullmatch(inner):
        backwards = ", ".join(reversed(split(inner)))
        yield from (
            rf"\{{{backwards}\}}",
            rf"\left\{{{inner}\right\}}",
            rf"\lbrace {inner} \rbrace",
            inner,
            f"{{{inner}}}",
        )


def _lists(text: str) -> Iterator[str]:
    if _SPLIT.fullmatch(text):
        parts = split(text)
        yield from (", ".join(parts[::-1]), ",".join(parts), r",\ ".join(parts), rf"\{{{text}\}}")
        before, last = ", ".join(parts[:-1]), parts[-1]
        for word in ("and", "or"):
            yield from (f"{before} {word} {last}", rf"{before} \text{{ {word} }} {last}", f"{before}, {word} {last}")
        yield ", ".join(f"x = {part}" for part in parts)
        yield r" \text{ or } ".join(f"x = {part}" for part in parts)


def _tuples(text: str) -> Iterator[str]:
    if re.fullmatch(r"\(-?\d+(?:, ?-?\d+)+\)", text):
        yield from (
            text.replace(" ", ""),
            text.replace(",", r",\ "),
            rf"(x, y) = {text}" if text.count(",") == 1 else "",
        )


def _intervals(text: str) -> Iterator[str]:
    if found := _ENDS.fullmatch(text):
        left, low, high, right = found.groups()
        below, above = "<" if left == "(" else r"\leq", "<" if right == ")" else r"\leq"
        if "[" in text or "]" in text or "\\infty" in text:
            yield rf"x \in {text}"
            yield from (
                f"{left}{low},{high}{right}",
                text.replace("\\infty", "∞"),
                rf"\left{left}{low}, {high}\right{right}",
            )
            if low == "-\\infty" != high and high != "\\infty":
                yield from (
                    f"x {above} {high}",
                    f"x {above.replace('leq', 'le')} {high}",
                    f"{high} {_MIRRORED[above]} x",
                )
            elif high == "\\infty" and low != "-\\infty":
                yield from (f"x {_MIRRORED[below]} {low}", f"{low} {below} x", f"{left}{low}, +\\infty{right}")
            elif "\\infty" not in text:
                yield f"{low} {below} x {above} {high}"


def _unions(text: str) -> Iterator[str]:
    if " \\cup " in text:
        parts = text.split(" \\cup ")
        yield from (
            r" \cup ".join(parts[::-1]),
            " \N{UNION} ".join(parts),
            r"\cup".join(parts),
            r" \text{ or } ".join(parts),
        )
        if len(parts) == 2 and (all(found := [_ENDS.fullmatch(part) for part in parts])):
            first, second = found
            if first[2] == "-\\infty" and second[3] == "\\infty":
                above, below = "<" if first[4] == ")" else r"\leq", ">" if second[1] == "(" else r"\geq"
                yield rf"x {above} {first[3]} \text{{ or }} x {below} {second[2]}"


def _matrices(text: str) -> Iterator[str]:
    if "\\begin{pmatrix}" in text:
        yield text.replace("pmatrix", "bmatrix")
        yield from (
            re.sub(r" ?(\\\\|&) ?", r"\1", text),
            text.replace("pmatrix", "matrix").join((r"\left(", r"\right)")),
        )
        columns = "c" * (1 + text.partition("\\\\")[0].count("&"))
        yield (
            text.replace("{pmatrix}", f"{{array}}{{{columns}}}", 1)
            .replace("{pmatrix}", "{array}")
            .join((r"\left(", r"\right)"))
        )


def _equations(text: str) -> Iterator[str]:
    if (sides := split(text, "=")) and len(sides) == 2 and all(sides) and sides[0] == "y":
        yield from (
            f"{sides[1]} = {sides[0]}",
            text.replace(" ", ""),
            text.replace("x", r" \cdot x"),
            text.replace("x", "*x"),
        )


def _polynomials(text: str) -> Iterator[str]:
    if found := re.fullmatch(r"(\d*)x\^2 ([+-]) (\d+)x \+ (\d+)", text):
        a, sign, b, c = found.groups()
        square = f"{a}x^2" if a else "x^2"
        yield from (f"{c} {sign} {b}x + {square}", f"{a}x^{{2}} {sign} {b}x+{c}", f"{a}x² {sign} {b}x + {c}")
        yield from (f"{a + '*' if a else ''}x**2 {sign} {b}*x + {c}", f"x({a or 1}x {sign} {b}) + {c}")


def _products(text: str) -> Iterator[str]:
    if found := re.fullmatch(r"(\d+)([a-z])([a-z])", text):
        a, x, y = found.groups()
        yield from (f"{a}{y}{x}", f"{a} {x} {y}", f"{a}*{x}*{y}", rf"{a} \cdot {x} \cdot {y}")


def _units(text: str) -> Iterator[str]:
    if found := _UNIT.fullmatch(text):
        number, unit = found.groups()
        yield from (number, rf"{number}\,\mathrm{{{unit}}}", rf"{number}~\text{{{unit}}}", rf"{number}\text{{ {unit}}}")
        if len(unit) > 2:
            yield f"{number} {unit}"


def _degrees(text: str) -> Iterator[str]:
    if found := _DEGREES.fullmatch(text):
        number = found[1]
        yield from (number, f"{number}°", rf"{number}^{{\circ}}", f"{number} degrees", rf"{number}\text{{ degrees}}")
        yield from (rf"{number}\degree", rf"{number}{{}}^\circ", rf"{number}\,^\circ", rf"\angle ABC = {number}^\circ")


def _bases(text: str) -> Iterator[str]:
    if found := _BASE.fullmatch(text):
        digits, base = found.groups()
        yield from (rf"{digits}_{{{base}}}", f"({digits})_{base}", digits, rf"{digits}_{{({base})}}")
        yield from (
            rf"{digits}_{{\text{{{base}}}}}",
            digits + "₀₁₂₃₄₅₆₇₈₉"[int(base)],
            rf"\text{{{digits}}}_{{{base}}}",
        )


def _letters(text: str) -> Iterator[str]:
    if found := _LETTER.fullmatch(text):
        letter = found[1]
        yield from (letter, f"({letter})", rf"\text{{{letter}}}", rf"\textbf{{({letter})}}", rf"\mathrm{{{letter}}}")
        yield from (f"{letter})", rf"\text{{{letter}.}}", rf"\mathbf{{{letter}}}", rf"\textbf{{({letter}) }}")


def _words(text: str) -> Iterator[str]:
    if found := _WORDS.fullmatch(text):
        words = found[1]
        yield from (words, rf"\text{{{words}}}", rf"\textbf{{{words}}}", rf"\mathrm{{{words}}}", words.lower())
        if ", " in words:
            *before, last = words.split(", ")
            yield from (", ".join([last, *before]), rf"\text{{{', '.join(before)} and {last}}}")
            yield ", ".join(rf"\text{{{word}}}" for word in (*before, last))


def _inequalities(text: str) -> Iterator[str]:
    if found := re.fullmatch(r"x (<|>|\\leq|\\geq) (-?\d+)", text):
        sign, end = found.groups()
        yield from (
            text.replace(r"\leq", r"\le").replace(r"\geq", r"\ge"),
            text.replace(" ", "") if "\\" not in text else "",
        )
        yield {
            "<": rf"(-\infty, {end})",
            ">": rf"({end}, \infty)",
            r"\leq": rf"(-\infty, {end}]",
            r"\geq": rf"[{end}, \infty)",
        }[sign]
        yield f"{end} {_MIRRORED[sign]} x"


RESPELLINGS: Mapping[str, Respelling] = {
    function.__name__[1:]: function
    for function in (
        _formula_marks,
        _bold,
        _end_of_sentence,
        _looks,
        _spaces_around,
        _brackets,
        _value_with_name,
        _upright,
        _sets,
        _lists,
        _tuples,
        _intervals,
        _unions,
        _matrices,
        _equations,
        _polynomials,
        _products,
        _units,
        _degrees,
        _bases,
        _letters,
        _words,
        _inequalities,
        *_number_respellings.FUNCTIONS,
    )
}


def respellings(text: str) -> dict[str, list[str]]:
    """Return the other spellings of a text by kind, kinds that do not apply left out."""
    found = {
        kind: [other for other in function(text) if other and other != text] for kind, function in RESPELLINGS.items()
    }
    return {kind: spellings for kind, spellings in found.items() if spellings}
