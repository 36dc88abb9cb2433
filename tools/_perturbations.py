r"""Wrong answers beside a gold answer: one function a kind, which returns a text, and nothing where it does not apply.

Most change the value. Those are kept only where `_answer_values` reads both texts and finds two values; the others are
wrong by what they are (another word, a relation instead of a number, noise around a number).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from random import Random

from _answer_values import is_number, split, surely_different, value_of
from _made_golds import MEASURES, WORDS

_NUMERAL = re.compile(r"(?<![\d.])\d+(?![\d.]*\})|(?<=\{)\d+(?=\})|(?<![\d.])\d+")
_NOT_VALUES = re.compile(r"\\text\{[^{}]*\}|\\(?:begin|end)\{\w+\}|_\{?\w+\}?")
_WORD = re.compile(r"((?:\\text\{)?\(?)([A-Za-z]{4,}|[A-Z])(\)?\}?)")
_ENDS = re.compile(r"([(\[])(.*)([)\]])")

Perturbation = Callable[[str, Random], str | None]


def _numerals(text: str) -> list[re.Match[str]]:
    """Return the whole numbers of a text that are parts of its value."""
    hidden = [found.span() for found in _NOT_VALUES.finditer(text)]
    return [n for n in re.finditer(r"\d+", text) if not any(begin <= n.start() < end for begin, end in hidden)]


def _with_numeral(text: str, rng: Random, change: Callable[[str], str]) -> str | None:
    if not (numerals := _numerals(text)):
        return None
    found = rng.choice(numerals)
    return text[: found.start()] + change(found[0]) + text[found.end() :]


def _neighbour(text: str, rng: Random) -> str | None:
    return _with_numeral(text, rng, lambda digits: str(int(digits) + 1).zfill(len(digits)))


def _one_less(text: str, rng: Random) -> str | None:
    return _with_numeral(text, rng, lambda digits: str(max(0, int(digits) - 1)).zfill(len(digits)))


def _digit_changed(text: str, rng: Random) -> str | None:
    def changed(digits: str) -> str:
        place = rng.randrange(len(digits))
        return digits[:place] + rng.choice("123456789".replace(digits[place], "")) + digits[place + 1 :]

    return _with_numeral(text, rng, changed)


def _digits_swapped(text: str, rng: Random) -> str | None:
    return _with_numeral(text, rng, lambda digits: digits[::-1])


def _digit_doubled(text: str, rng: Random) -> str | None:
    return _with_numeral(text, rng, lambda digits: digits + digits[-1])


def _tenfold(text: str, rng: Random) -> str | None:
    return _with_numeral(text, rng, lambda digits: digits + "0")


def _sign(text: str, rng: Random) -> str | None:
    if is_number(text) and not re.search(r"(?<!\A)[+-]", text):
        return text.removeprefix("-") if text.startswith("-") else f"-{text}"
    return None


def _inner_sign(text: str, rng: Random) -> str | None:
    signs = list(re.finditer(r"(?<=[\w}] )[+-](?= )|(?<=[(,{&] )-(?=\d)|(?<=[(,{&])-(?=\d)", text))
    if not signs:
        return None
    found = rng.choice(signs)
    return text[: found.start()] + ("-" if found[0] == "+" else "+") + text[found.end() :]


def _reciprocal(text: str, rng: Random) -> str | None:
    if found := re.fullmatch(r"(-?)\\[dt]?frac\{(\w+)\}\{(\w+)\}", text):
        return rf"{found[1]}\frac{{{found[3]}}}{{{found[2]}}}"
    return rf"\frac{{1}}{{{text}}}" if re.fullmatch(r"\d+", text) else None


def _doubled(text: str, rng: Random) -> str | None:
    return rf"2({text})" if is_number(text) and "%" not in text and "text" not in text else None


def _one_more(text: str, rng: Random) -> str | None:
    return f"{text} + 1" if is_number(text) and "%" not in text and "text" not in text else None


def _squared(text: str, rng: Random) -> str | None:
    return f"({text})^2" if is_number(text) and "%" not in text and "text" not in text else None


def _rounded(text: str, rng: Random) -> str | None:
    value = value_of(text)
    if value is None or value.kind != "number" or re.search(r"(?<!\\)[a-hj-z](?![a-z])", text):
        return None
    number = complex(value.parts[0])  # type: ignore[arg-type]
    return f"{number.real:.2f}" if number.imag == 0 and abs(number) < 1e6 else None


def _root_left_out(text: str, rng: Random) -> str | None:
    return re.sub(r"\\sqrt(?=\{)", "", text, count=1) if "\\sqrt{" in text else None


def _root_and_factor_swapped(text: str, rng: Random) -> str | None:
    swapped = re.sub(r"(\d+)\\sqrt\{(\d+)\}", r"\2\\sqrt{\1}", text, count=1)
    return swapped if swapped != text else None


def _base_and_exponent_swapped(text: str, rng: Random) -> str | None:
    swapped = re.sub(r"(\d+)\^\{(\d+)\}", r"\2^{\1}", text, count=1)
    return swapped if swapped != text else None


def _power_by_one(text: str, rng: Random) -> str | None:
    return re.sub(r"\^\{(\d+)\}", lambda found: f"^{{{int(found[1]) + 1}}}", text, count=1) if "^{" in text else None


def _mixed_number_as_product(text: str, rng: Random) -> str | None:
    if found := re.fullmatch(r"(\d+)\\frac\{(\d+)\}\{(\d+)\}", text):
        return rf"\frac{{{int(found[1]) * int(found[2])}}}{{{found[3]}}}"
    return None


def _pi_left_out(text: str, rng: Random) -> str | None:
    return text.replace("\\pi", "") if re.search(r"\d\\pi", text) else None


def _other_letter(text: str, rng: Random) -> str | None:
    found = list(re.finditer(r"(?<![\\A-Za-z{])[a-z](?![A-Za-z])", text))
    if not found or "\\text" in text:
        return None
    letter = rng.choice(found)
    return text[: letter.start()] + rng.choice("uvw".replace(letter[0], "")) + text[letter.end() :]


def _places_swapped(text: str, rng: Random) -> str | None:
    plain = re.sub(r"\\(?:left|right)\s?", "", text)
    if (found := _ENDS.fullmatch(plain.strip())) and len(parts := split(found[2].strip())) > 1:
        return f"{found[1]}{', '.join([*parts[1:], parts[0]])}{found[3]}"
    return None


def _ends(text: str, rng: Random) -> str | None:
    brackets = [found for found in re.finditer(r"[(\[\])]", text) if not _at_infinity(text, found)]
    if ("\\infty" not in text and "[" not in text and "]" not in text) or not brackets:
        return None
    found = rng.choice(brackets)
    return text[: found.start()] + {"(": "[", "[": "(", ")": "]", "]": ")"}[found[0]] + text[found.end() :]


def _at_infinity(text: str, bracket: re.Match[str]) -> bool:
    beside = text[bracket.end() :].lstrip() if bracket[0] in "([" else text[: bracket.start()].rstrip()
    return beside.startswith(("-\\infty", "\\infty")) if bracket[0] in "([" else beside.endswith("\\infty")


def _element_left_out(text: str, rng: Random) -> str | None:
    return _with_elements(text, lambda parts: parts[:-1] if len(parts) > 1 else None)


def _element_added(text: str, rng: Random) -> str | None:
    return _with_elements(text, lambda parts: [*parts, str(rng.randint(100, 999))])


def _with_elements(text: str, change: Callable[[list[str]], list[str] | None]) -> str | None:
    """Return a list, set or tuple with other elements."""
    left, inner, right = "", text, ""
    if found := re.fullmatch(r"(\\\{|\()(.*)(\\\}|\))", text):
        left, inner, right = found.groups()
    if "\\text" in text or "&" in text or len(parts := split(inner)) < 2 or not (changed := change(parts)):
        return None
    return f"{left}{', '.join(changed)}{right}"


def _transposed(text: str, rng: Random) -> str | None:
    if found := re.fullmatch(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", text, re.DOTALL):
        rows = [row.split("&") for row in found[1].split("\\\\")]
        if len({len(row) for row in rows}) == 1:
            body = " \\\\ ".join(" & ".join(cell.strip() for cell in column) for column in zip(*rows, strict=True))
            return rf"\begin{{pmatrix}} {body} \end{{pmatrix}}"
    return None


CHANGED: tuple[Perturbation, ...] = (
    _neighbour,
    _one_less,
    _digit_changed,
    _digits_swapped,
    _digit_doubled,
    _tenfold,
    _sign,
    _inner_sign,
    _reciprocal,
    _doubled,
    _one_more,
    _squared,
    _rounded,
    _root_left_out,
    _root_and_factor_swapped,
    _base_and_exponent_swapped,
    _power_by_one,
    _mixed_number_as_product,
    _pi_left_out,
    _other_letter,
    _places_swapped,
    _ends,
    _element_left_out,
    _element_added,
    _transposed,
)
"""Kinds whose texts must be read and have another value."""


def _relation(text: str, rng: Random) -> str | None:
    return f"{rng.choice(['<', '>', chr(92) + 'geq', chr(92) + 'leq', 'x >'])} {text}" if is_number(text) else None


def _denied(text: str, rng: Random) -> str | None:
    return rng.choice([r"\text{not } ", r"\neq ", r"\text{less than } "]) + text if is_number(text) else None


def _false_equation(text: str, rng: Random) -> str | None:
    return f"{int(text) + rng.randint(1, 9)} = {text}" if re.fullmatch(r"-?\d+", text) else None


def _noise(text: str, rng: Random) -> str | None:
    if not is_number(text):
        return None
    return rng.choice(
        [f"7 @ {text}", f"{text} ?", rf"4 \nosuchcommand {text}", f"{text} {text}", f"[{text} ; 8]", f"{text} !? 3"]
    )


def _two_answers(text: str, rng: Random) -> str | None:
    other = _neighbour(text, rng) or ""
    if is_number(text) and surely_different(value_of(text), value_of(other)):
        return rng.choice([f"{other}, {text}", rf"{text} \text{{ or }} {other}", rf"{text} \text{{ and }} {other}"])
    return None


def _words_that_change_the_value(text: str, rng: Random) -> str | None:
    words = ("million", "thousand", "halves", "squared", "dozen", "or more")
    return rf"{text} \text{{ {rng.choice(words)}}}" if re.fullmatch(r"[2-9]\d*", text) else None


def _other_word(text: str, rng: Random) -> str | None:
    if found := _WORD.fullmatch(text):
        others = WORDS if len(found[2]) > 1 else "ABCDEFGH"
        return found[1] + rng.choice([word for word in others if word.casefold() != found[2].casefold()]) + found[3]
    return None


def _letters_of_a_word_swapped(text: str, rng: Random) -> str | None:
    found = _WORD.fullmatch(text)
    if found is None or len(found[2]) < 2:
        return None
    places = [
        place for place in range(len(found[2]) - 1) if found[2][place].casefold() != found[2][place + 1].casefold()
    ]
    if not places:
        return None
    place = rng.choice(places)
    word = found[2][:place] + found[2][place + 1] + found[2][place] + found[2][place + 2 :]
    return found[1] + word + found[3]


def _word_left_out(text: str, rng: Random) -> str | None:
    found = re.fullmatch(r"\\text\{([A-Za-z]{4,}(?:, [A-Za-z]{4,})+)\}", text)
    return rf"\text{{{found[1].rpartition(', ')[0]}}}" if found else None


def _other_base(text: str, rng: Random) -> str | None:
    if found := re.fullmatch(r"(\d+)_\{?(\d)\}?", text):
        return f"{found[1]}_{int(found[2]) + 1}"
    return None


def _other_digits_of_a_base(text: str, rng: Random) -> str | None:
    found = re.fullmatch(r"(\d+)(_\{?\d\}?)", text)
    return f"1{found[1]}{found[2]}" if found else None


def _other_unit(text: str, rng: Random) -> str | None:
    if found := re.fullmatch(r"(\d+ ?\\text\{ ?)([a-z ]+)\}", text):
        others = [unit for unit in MEASURES if unit != found[2] and found[2] in MEASURES]
        return f"{found[1]}{rng.choice(others)}}}" if others else None
    return None


CERTAIN: tuple[Perturbation, ...] = (
    _relation,
    _denied,
    _false_equation,
    _noise,
    _two_answers,
    _words_that_change_the_value,
    _other_word,
    _letters_of_a_word_swapped,
    _word_left_out,
    _other_base,
    _other_digits_of_a_base,
    _other_unit,
)
"""Kinds that are wrong by what they are."""

PERTURBATIONS: Mapping[str, Perturbation] = {function.__name__[1:]: function for function in (*CHANGED, *CERTAIN)}


def perturbations(text: str, rng: Random) -> tuple[dict[str, str], list[str]]:
    """Return wrong answers by kind, and the kinds whose answer is left out as it may equal the gold one."""
    gold, kept, dropped = value_of(text), {}, []
    for kind, function in PERTURBATIONS.items():
        other = function(text, rng)
        if other is None or other == text:
            continue
        if function in CERTAIN or surely_different(gold, value_of(other)):
            kept[kind] = other
        else:
            dropped.append(kind)
    return kept, dropped
