r"""The table of answers: gold answer, answer, whether it is right, and the rule that decides."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hdpo.rewards.math import GoldError, parse_gold, score_math

RIGHT, WRONG = 1.0, 0.0

TABLE = [
    # What does not parse as a whole is wrong; no number is picked out of it.
    ("5", "the answer is surely not 5 :(", WRONG, "noise"),
    ("5", "6 @ 5", WRONG, "noise"),
    ("5", "2, 3 and 5?", WRONG, "noise"),
    ("5", r"4 \nosuchcommand 5", WRONG, "noise"),
    ("5", "[1 ~ 5]", WRONG, "noise"),
    ("5", "5 ?", WRONG, "noise"),
    ("12", "1 2", WRONG, "two numbers in a row are no number"),
    ("5", "5 5", WRONG, "two numbers in a row are no number"),
    ("3", r"\log_2 8", RIGHT, "a subscript is no number in a row"),
    (r"\dfrac 3 8", "3/8", RIGHT, "nor are the numbers of a fraction"),
    (r"\tfrac 94", "2.25", RIGHT, "nor are the numbers of a fraction"),
    (r"\frac13", "0.333333", RIGHT, "rounded"),
    ("-1", r"\begin{matrix} 2 & -1", WRONG, "noise"),
    (r"\frac{1}{2}", r"6 @ \frac{1}{2}", WRONG, "noise"),
    ("12", r"\text{either } 11 \text{ or so, maybe } 12", WRONG, "noise"),
    ("0", r"\text{less than } 0", WRONG, "words before 0"),
    ("0", "not 0", WRONG, "words before 0"),
    ("0", r"x = \text{never } 0", WRONG, "words before 0"),
    ("0", r"\text{Area} = 5 - 5 = 0", RIGHT, "words before 0"),
    ("0", r"0 \text{ units}", RIGHT, "words before 0"),
    ("0", r"\sin(0)", RIGHT, "words before 0"),
    ("7", "", WRONG, "empty"),
    ("7", ".", WRONG, "empty"),
    # Whole numbers before fractions.
    ("3 1/2", "7/2", RIGHT, "mixed number"),
    ("3 1/2", "2", WRONG, "mixed number"),
    (r"\frac{7}{2}", "3 1/2", RIGHT, "mixed number"),
    (r"\frac{7}{2}", r"3\frac12", RIGHT, "mixed number"),
    (r"\frac{7}{2}", r"3 \dfrac{1}{2}", RIGHT, "mixed number"),
    (r"\frac{3}{2}", "3 1/2", WRONG, "mixed number"),
    # Units, and letters that are none.
    ("2s", "2", WRONG, "one letter is no unit"),
    ("2", "2s", WRONG, "one letter is no unit"),
    ("2s", r"2 \cdot s", RIGHT, "one letter is no unit"),
    ("2s", "s + s", RIGHT, "one letter is no unit"),
    ("4", "4 m", WRONG, "one letter is no unit"),
    ("4t", "4", WRONG, "one letter is no unit"),
    ("3h", "h + 2h", RIGHT, "one letter is no unit"),
    ("2ab", "2", WRONG, "a product is no unit"),
    ("2ab", "2ba", RIGHT, "a product is no unit"),
    ("r + s", "s + r", RIGHT, "a product is no unit"),
    ("r + s", "r", WRONG, "a product is no unit"),
    ("a + b + c", "c + b + a", RIGHT, "a product is no unit"),
    ("a + b + c", "a + d", WRONG, "a product is no unit"),
    ("15", r"15~\text{cm}^{2}", RIGHT, "upright unit"),
    ("15", r"15\text{ cm}^2", RIGHT, "upright unit"),
    ("15", r"15 \mathrm{m}", RIGHT, "upright unit"),
    ("15", r"15\,\mathrm{km/h}", RIGHT, "upright unit"),
    (r"15\text{ cm}", "15", RIGHT, "upright unit"),
    (r"15\text{ cm}", "16", WRONG, "upright unit"),
    (r"2\sqrt{3}", r"2\sqrt{3} \text{ units}", RIGHT, "upright unit"),
    ("15", "15 cm^2", RIGHT, "abbreviation"),
    ("15", "15cm", RIGHT, "abbreviation"),
    ("60", "60 km/h", RIGHT, "abbreviation"),
    ("18", "18 dollars", RIGHT, "words behind a number"),
    ("18", "18 bananas", RIGHT, "words behind a number"),
    ("24", "24 square feet", RIGHT, "words behind a number"),
    ("5", "5 or more", WRONG, "words that change the value"),
    ("5", "5 halves", WRONG, "words that change the value"),
    ("5", "5 squared", WRONG, "words that change the value"),
    ("5", r"5 \text{ million}", WRONG, "words that change the value"),
    ("1500000", "1.5 million", RIGHT, "power of ten in words"),
    ("2000", r"2 \text{ thousand}", RIGHT, "power of ten in words"),
    ("30", r"30^\circ", RIGHT, "degrees"),
    ("30", r"30^{\circ}", RIGHT, "degrees"),
    ("30", "30 degrees", RIGHT, "degrees"),
    ("30", r"30\degree", RIGHT, "degrees"),
    ("30", r"30{}^\circ", RIGHT, "degrees"),
    (r"\frac{1}{2}", r"\sin 30\degree", RIGHT, "degrees of a function"),
    (r"15\text{ cm}", r"15\text{ m}", WRONG, "two units"),
    (r"15\text{ cm}", "15 centimeters", RIGHT, "two units"),
    (r"15\text{ cm}^2", "15 square centimetres", RIGHT, "two units"),
    (r"15\text{ hours}", "15 minutes", WRONG, "two units"),
    (r"15\text{ apples}", r"15\text{ kg}", RIGHT, "what is counted is no unit"),
    ("5", "5 °C", RIGHT, "degrees"),
    (r"\frac{1}{2}", r"\sin 30^\circ", RIGHT, "degrees of a function"),
    (r"\frac{1}{2}", r"\cos(60^{\circ})", RIGHT, "degrees of a function"),
    (r"\frac{1}{2}", r"\sin 31^\circ", WRONG, "degrees of a function"),
    ("18", r"\$18", RIGHT, "currency"),
    ("18", "$18.00", RIGHT, "currency"),
    ("18", "€18", RIGHT, "currency"),
    # Digits, dashes, spaces.
    ("1000", r"1\,000", RIGHT, "groups of digits"),
    ("1000", "1,000", RIGHT, "groups of digits"),
    ("1000", "1 000", RIGHT, "groups of digits"),
    ("1000", "1~000", RIGHT, "groups of digits"),
    ("1000", "1{,}000", RIGHT, "groups of digits"),
    ("1234567", r"1\,234\,567", RIGHT, "groups of digits"),
    ("1000", "1\N{THIN SPACE}000", RIGHT, "groups of digits"),
    ("1000", r"1\,00", WRONG, "groups of digits"),
    ("0", r"1\,000", WRONG, "groups of digits"),
    ("-5", "\N{EN DASH}5", RIGHT, "dashes"),
    ("-5", "\N{MINUS SIGN}5", RIGHT, "dashes"),
    ("-5", "\N{FULLWIDTH HYPHEN-MINUS}5", RIGHT, "dashes"),
    ("5", "\N{EN DASH}5", WRONG, "dashes"),
    ("47", "\N{FULLWIDTH DIGIT FOUR}\N{FULLWIDTH DIGIT SEVEN}", RIGHT, "digits of other scripts"),
    ("47", "\N{ARABIC-INDIC DIGIT FOUR}\N{ARABIC-INDIC DIGIT SEVEN}", RIGHT, "digits of other scripts"),
    ("47", "\N{FULLWIDTH DIGIT FOUR}\N{FULLWIDTH DIGIT EIGHT}", WRONG, "digits of other scripts"),
    ("x^{12}", "x¹²", RIGHT, "raised digits"),
    ("5^2", "5²", RIGHT, "raised digits"),
    ("52", "5²", WRONG, "raised digits"),
    (r"\frac{1}{2}", "½", RIGHT, "fractions of one character"),
    (r"\sqrt{12}", "√12", RIGHT, "roots of one character"),
    (r"\sqrt{12}", "2√3", RIGHT, "roots of one character"),
    (r"3\pi", "3π", RIGHT, "letters"),
    (r"2 \theta", "2θ", RIGHT, "letters"),
    (r"(-\infty, 3)", "(-∞, 3)", RIGHT, "letters"),
    ("6", "6\N{ZERO WIDTH SPACE}", RIGHT, "invisible characters"),
    # Numbers as programs write them.
    ("1000000", "1e6", RIGHT, "e-notation"),
    ("1500", "1.5e3", RIGHT, "e-notation"),
    ("1e-05", "0.00001", RIGHT, "e-notation"),
    ("0.00001", "1e-05", RIGHT, "e-notation"),
    ("0.00002", "1e-05", WRONG, "e-notation"),
    (r"1.9 \times 10^{6}", "1.9 x 10^{6}", RIGHT, "e-notation"),
    ("10000000000000000", "1e+16", RIGHT, "e-notation"),
    ("7", "1e99999999", WRONG, "too large"),
    (r"-2\pi", "-2*pi", RIGHT, "names without a backslash"),
    ("x^2", "x**2", RIGHT, "power"),
    ("2^{10}", "2**10", RIGHT, "power"),
    (r"\sqrt{3}", "sqrt(3)", RIGHT, "names without a backslash"),
    ("14 - i", "14.0 + -1.0i", RIGHT, "signs in a row"),
    ("3 + 4i", "4i + 3", RIGHT, "complex numbers"),
    ("i", r"\sqrt{-1}", RIGHT, "complex numbers"),
    ("-i", r"\sqrt{-1}", WRONG, "complex numbers"),
    ("e", r"\mathrm{e}", RIGHT, "upright e and i"),
    (r"e^{2}", r"\mathrm{e}^2", RIGHT, "upright e and i"),
    ("2i", r"2\mathrm{i}", RIGHT, "upright e and i"),
    (r"\frac{1}{3}", r"0.\overline{3}", RIGHT, "repeating decimals"),
    (r"\frac{1}{6}", r"0.1\overline{6}", RIGHT, "repeating decimals"),
    (r"\frac{1}{3}", r"0.\overline{4}", WRONG, "repeating decimals"),
    (r"1.\overline{27}", r"\frac{14}{11}", RIGHT, "repeating decimals"),
    # How a formula looks.
    ("73", "**73**", RIGHT, "bold"),
    ("73", r"\mathbf{73}", RIGHT, "bold"),
    ("73", r"\displaystyle 73", RIGHT, "looks"),
    ("73", "$73$", RIGHT, "marks of a formula"),
    ("73", r"\(73\)", RIGHT, "marks of a formula"),
    ("73", r"\bm{73}", RIGHT, "bold"),
    (r"\frac{1}{2}", r"\boldsymbol{\frac{1}{2}}", RIGHT, "bold"),
    ("61, 68", r"\mathbf{61, 68}", RIGHT, "bold"),
    ("73", r"\large 73", RIGHT, "looks"),
    ("73", r"\textcolor{red}{73}", RIGHT, "looks"),
    (r"(-\infty, 8)", r"{(-\infty, 8)}", RIGHT, "braces around the whole"),
    (r"\text{red}", r"{\text{red}}", RIGHT, "braces around the whole"),
    (r"\$70.71", r"\text{\$70.71}", RIGHT, "upright numbers"),
    ("5", r"5\\", RIGHT, "trailing line break"),
    ("18.", "18", RIGHT, "final full stop"),
    (
        r"\begin{pmatrix} 1 & -1 \\ 1 & \phantom -1 \end{pmatrix}",
        r"\begin{pmatrix} 1 & -1 \\ 1 & 1 \end{pmatrix}",
        RIGHT,
        "phantoms are not seen",
    ),
    (r"\begin{pmatrix} 1 & -1 \\ 1 & \phantom -1 \end{pmatrix}", "-1", WRONG, "phantoms are not seen"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", RIGHT, "matrix"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", WRONG, "matrix"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \tfrac{\pi}{2})", RIGHT, "looks"),
    # Sets and intervals.
    (r"\emptyset", r"\varnothing", RIGHT, "empty set"),
    (r"\emptyset", r"\{\}", RIGHT, "empty set"),
    (r"\emptyset", "∅", RIGHT, "empty set"),
    (r"\emptyset", "0", WRONG, "empty set"),
    (r"\{1, 2\}", r"\lbrace 2, 1 \rbrace", RIGHT, "set"),
    ("(0, 12.5)", "0 < x < 12.5", RIGHT, "interval and inequality"),
    ("[0, 1]", r"0 \le x \leqslant 1", RIGHT, "interval and inequality"),
    ("[0, 1]", "0 < x < 1", WRONG, "interval and inequality"),
    ("[1,2]", r"x \in [1,2]", RIGHT, "interval and inequality"),
    (r"(-\infty,3)\cup(5,\infty)", r"x < 3 \text{ or } x > 5", RIGHT, "union"),
    (r"(-\infty,3)\cup(5,\infty)", r"(-\infty,3) \text{ or } (5,\infty)", RIGHT, "union"),
    (r"(-\infty,3)\cup(5,\infty)", r"x < 3 \text{ or } x > 6", WRONG, "union"),
    ("(1,2)", "[1,2]", WRONG, "interval"),
    ("(1,2)", "(2,1)", WRONG, "ordered pair"),
    ("1,2,3", "3, 1, 2", RIGHT, "list"),
    ("1,2,3", "1,2", WRONG, "list"),
    ("5,6", r"5 \text{ or } 6", RIGHT, "list in words"),
    ("5,6", r"5 \text{, and } 6", RIGHT, "list in words"),
    ("5,6", "5 and 7", WRONG, "list in words"),
    (r"1, 2, \ldots, 10", r"1,2,\dots,10", RIGHT, "dots"),
    (r"1, 2, \ldots, 10", "1,2,10", WRONG, "dots"),
    # Words.
    (r"\text{H, E}", "H, E", RIGHT, "list of words"),
    (r"\text{H, E}", "E and H", RIGHT, "list of words"),
    (r"\text{H, E}", "H", WRONG, "list of words"),
    (r"\text{Softball, Kickball}", r"\text{Kickball and Softball}", RIGHT, "list of words"),
    ("CBAD", "CBAD", RIGHT, "points"),
    ("CBAD", "ABCD", WRONG, "points"),
    (r"\text{CBAD}", "CBAD", RIGHT, "points"),
    (r"\text{Monday}", r"\text{Monday.}", RIGHT, "words"),
    ("Monday", r"\textbf{monday}", RIGHT, "words"),
    ("Monday", "yaMdno", WRONG, "words"),
    (r"\text{(C)}", "C", RIGHT, "words"),
    ("C", r"\textbf{(C)}", RIGHT, "words"),
    ("C", "C)", RIGHT, "a letter of a choice"),
    ("C", r"\text{C.}", RIGHT, "a letter of a choice"),
    ("C", "D", WRONG, "words"),
    ("xyz", "zyx", RIGHT, "products"),
    # Bases.
    ("52_8", "52_7", WRONG, "base"),
    ("52_7", "52_{7}", RIGHT, "base"),
    ("52_7", "52", RIGHT, "a base that is not written"),
    ("52_7", "53_7", WRONG, "base"),
    ("52_7", r"52_{\text{seven}}", RIGHT, "base"),
    ("52_7", r"52_{\text{7}}", RIGHT, "base"),
    ("52_7", r"\text{52}_{(7)}", RIGHT, "base"),
    ("52_7", r"52_{\text{eight}}", WRONG, "base"),
    # Equations and relations.
    ("7", "x = 7", RIGHT, "equation"),
    ("7", "8 = 7", WRONG, "false equation"),
    ("7", "x = 8 = 7", WRONG, "false equation"),
    ("7", "5 + 2 = 7", RIGHT, "equation"),
    ("7", "x = 5 + 2 = 7", RIGHT, "equation"),
    ("31.4", r"10\pi = 31.4", RIGHT, "rounded equation"),
    ("30", r"\angle ABC = 30^\circ", RIGHT, "name of the value"),
    ("30", r"\text{area} = 30", RIGHT, "name of the value"),
    ("5", r"\geq 5", WRONG, "relation"),
    ("5", "< 5", WRONG, "relation"),
    ("5", "x > 5", WRONG, "relation"),
    ("3 - 13i", "x > 3 - 13i", WRONG, "relation"),
    ("y = 2x + 3", "2x + 3 = y", RIGHT, "equation"),
    ("y = 2x + 3", "y = 3x + 2", WRONG, "equation"),
    # Numbers that differ.
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", WRONG, "small numbers"),
    (r"\frac{1}{2^{99}}", r"2^{-99}", RIGHT, "small numbers"),
    ("10^{-7}", r"2 \cdot 10^{-7}", WRONG, "small numbers"),
    ("0.0000001", "0.0000002", WRONG, "small numbers"),
    (r"(1, \frac{1}{2^{99}})", r"(1, \frac{1}{2^{98}})", WRONG, "small numbers"),
    (r"\{1, 2^{-90}\}", r"\{2^{-91}, 1\}", WRONG, "small numbers"),
    ("10^{30}", "10^{30} + 1", WRONG, "large numbers"),
    ("2^{1000}", "2^{1000} + 1", WRONG, "large numbers"),
    ("1234567", "1234568.0", WRONG, "large numbers"),
    (r"\frac{1}{3}", "0.333333", RIGHT, "rounded"),
    (r"\frac{1}{3}", "0.3333", WRONG, "rounded too much"),
    (r"\frac{100}{3}", "33.333333", RIGHT, "rounded"),
    (r"\sqrt{2}", "1.414214", RIGHT, "rounded"),
    (r"\frac{1}{2}", r"50\%", RIGHT, "percentage"),
    ("50", r"50\%", RIGHT, "percentage"),
    ("50", r"5\%", WRONG, "percentage"),
    (r"33\frac{1}{3}\%", r"\frac{1}{3}", RIGHT, "percentage"),
    (r"\frac{1}{3}", r"33\frac{1}{3}\%", RIGHT, "percentage"),
    (r"34.5\%", "34.5", RIGHT, "percentage"),
    (r"1, 2\%", r"2\%, 1", RIGHT, "percentage in a list"),
    (r"1, 2\%", r"3\%, 1", WRONG, "percentage in a list"),
    ("34.5", r"34.5\%", RIGHT, "percentage"),
    (r"34.5\%", r"34.5\text{ percent}", RIGHT, "percentage"),
    (r"34.5\%", "0.345", RIGHT, "percentage"),
    (r"50\%", r"0.5\%", WRONG, "percentage"),
    (r"50\%", r"5000\%", WRONG, "percentage"),
    (r"0.00001\%", r"0.00002\%", WRONG, "percentage"),
    (r"3.9 \times 10^{-7}", r"\frac{39}{10^{8}}", RIGHT, "small decimals"),
    (r"3.9 \times 10^{-7}", r"\frac{38}{10^{8}}", WRONG, "small decimals"),
    ("51675095360", "5.1675095360e10", RIGHT, "large decimals"),
    ("51675095360", r"5.1675095361 \times 10^{10}", WRONG, "large decimals"),
    ("1234567890.1", "1234567890.2", WRONG, "large decimals"),
    # What nobody can evaluate is compared as text.
    ("9^{9^{9}}", "9^{9^9}", RIGHT, "too large"),
    ("9^{9^{9}}", "9^{9^8}", WRONG, "too large"),
    ("9^{9^{9}}", "7", WRONG, "too large"),
    ("2^{64}", "18446744073709551616", RIGHT, "large"),
]


@pytest.mark.parametrize(("gold", "answer", "reward", "rule"), TABLE)
def test_verdict(gold: str, answer: str, reward: float, rule: str) -> None:
    assert score_math(gold, rf"\boxed{{{answer}}}") == reward, rule


def test_the_table_is_long_enough() -> None:
    assert len({(gold, answer) for gold, answer, _, _ in TABLE}) == len(TABLE) >= 150


@pytest.mark.parametrize(
    "gold", ["", " ", "{", r"05\!:\!00", r"\frac{1}{0}", "7 @ 5", "5?", "3 and 4 ~ (", r"4 \nosuchcommand 5", "5 5"]
)
def test_a_gold_answer_that_does_not_parse_as_a_whole_is_an_error_of_the_data(gold: str) -> None:
    with pytest.raises(GoldError, match="gold answer"):
        parse_gold(gold)


outside = st.text(alphabet="57x=@., \n$#*()[]<>", max_size=30)


@given(outside, outside, st.sampled_from(["5", "6", "6 @ 5", r"\text{five}"]))
@settings(max_examples=50, deadline=None)
def test_text_around_a_box_changes_no_verdict(before: str, after: str, answer: str) -> None:
    for answer_format in ("boxed", "lenient"):
        assert score_math("5", f"{before}\\boxed{{{answer}}}{after}", answer_format) == float(answer == "5")


@given(st.text(alphabet="15@?;~ \\xa", max_size=12))
@settings(max_examples=100, deadline=None)
def test_a_number_is_never_picked_out_of_noise(noise: str) -> None:
    assert score_math("777", rf"\boxed{{{noise} ? 777}}") == score_math("777", rf"\boxed{{777 @ {noise}}}") == 0.0


@pytest.mark.parametrize(
    ("gold", "response", "reward"),
    [
        ("12", "So the answer is 12 apples.", RIGHT),
        ("42", "The answer is not 42", WRONG),
        ("42", "The answer is 42, since 40 + 3 = 43 is too many.", RIGHT),
        ("1600", "#### 1,600 dollars", RIGHT),
        ("(1,2)", "The answer is (1, 2).", RIGHT),
        ("7", "3 + 4\n= 7", RIGHT),
        ("5", "Tom has 5 apples left", RIGHT),
        ("5", "<answer>5 @</answer>", WRONG),
        ("5", "#### 6 @ 5", WRONG),
    ],
)
def test_sentences_of_the_lenient_format(gold: str, response: str, reward: float) -> None:
    assert score_math(gold, response, "lenient") == reward
