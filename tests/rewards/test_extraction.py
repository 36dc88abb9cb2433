"""Where the final answer of a response is: a table of cases, and properties of the brace matching."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hdpo.data.tasks import knights_knaves, letter_choice
from megatron_hdpo.rewards import exact, extraction
from megatron_hdpo.rewards.extraction import extract_answer, last_boxed, trim

BOXED = [
    (r"so \boxed{5}", "5"),
    (r"\boxed{1} and then \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\text{a } \{b\}}", r"\text{a } \{b\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed{a \\ {b}}", r"a \\ {b}"),
    (r"\fbox{7}", "7"),
    (r"\boxed {7}", "7"),
    (r"\boxed{\boxed{3}}", "3"),
    (r"\boxed{ 12 .}", "12"),
    (r"\boxed{5\,}", r"5\,"),
    ("<think>maybe \\boxed{1}</think> no: \\boxed{2}", "2"),
    ("thoughts \\boxed{1}</think>\\boxed{2}", "2"),
    ("<think>a</think> b </think> \\boxed{4}", "4"),
    ("\\boxed{4}<think>or is it \\boxed{5}", "4"),
]

NO_BOX = [
    "",
    "the answer is 5",
    r"\boxed{}",
    r"\boxed{  }",
    r"\boxed{5",
    r"\boxed{3} no wait \boxed{5",
    r"\boxed 5",
    "<think>\\boxed{5}</think> the answer is five",
    "<think>still thinking, \\boxed{5}",
]

LENIENT = [
    ("<answer> 5 </answer>", "5", "tag"),
    ("<answer>4</answer> no <ANSWER>5</ANSWER>", "5", "tag"),
    ("3 + 4\n#### 7", "7", "hashes"),
    ("The final answer is 7.", "7", "phrase"),
    ("Answer: 7", "7", "phrase"),
    ("the answer is 6, no: the answer is: 7", "7", "phrase"),
    ("3 + 4\n= 7\n\n", "= 7", "line"),
    ("the answer is 3\n\\boxed{4}", "4", "box"),
    ("<answer>3 <answer>4</answer> 5", "4", "tag"),
    ("#### 1,600 dollars", "1,600 dollars", "hashes"),
    ("The answer is 42, since 40 + 3 = 43 is too many.", "42", "phrase"),
    ("The answer is (1, 2). Done", "(1, 2)", "phrase"),
    ("The answer is 3.5; the other 7", "3.5", "phrase"),
    ("The answer is $x = 5$ for 9 of them", "x = 5", "phrase"),
    ("The answer is\n\n42", "42", "phrase"),
]


@pytest.mark.parametrize(("response", "answer"), BOXED)
def test_last_box_outside_the_thoughts_is_the_answer(response, answer):
    extracted = extract_answer(response)
    assert extracted is not None
    assert (extracted.text, extracted.source) == (answer, "box")


@pytest.mark.parametrize("response", NO_BOX)
def test_without_a_complete_box_there_is_no_answer(response):
    assert extract_answer(response) is None


@pytest.mark.parametrize(("response", "answer", "source"), LENIENT)
def test_lenient_format_falls_back_in_order(response, answer, source):
    extracted = extract_answer(response, "lenient")
    assert extracted is not None
    assert (extracted.text, extracted.source) == (answer, source)


@pytest.mark.parametrize(
    "response", ["", "\n \n", r"\boxed{3} then \boxed{5", "<think>the answer is 5", "The answer is not 42"]
)
def test_lenient_format_does_not_invent_answers(response):
    assert extract_answer(response, "lenient") is None


balanced = st.recursive(
    st.text(alphabet="ab1+ ", max_size=5) | st.sampled_from([r"\{", r"\}", r"\\"]),
    lambda inner: st.lists(inner, max_size=3).map("".join) | inner.map(lambda text: "{" + text + "}"),
    max_leaves=8,
)


@given(balanced, st.text(max_size=20), st.text(alphabet="xyz{} .", max_size=20))
def test_a_box_around_balanced_text_gives_that_text(content, before, after):
    assert last_boxed(before + "\\boxed{" + content + "}" + after) == content


@given(st.text(max_size=80))
def test_any_text_is_met_without_an_exception(response):
    for answer_format in ("boxed", "lenient"):
        answer = extract_answer(response, answer_format)
        assert answer is None or answer.text.strip()


PIECES = [
    " ",
    "\n",
    ".",
    "<answer>",
    "</answer>",
    "<answer> ",
    "####",
    "#### ",
    "answer is ",
    "answer: (",
    "\\boxed",
    "\\boxed{",
]
PIECES += ["\\fbox ", "{", "}", "\\", "<think>", "</think>", "$", "$$ ", "x", "\\right", "a.", "answer is $", ", "]


def steps(function: Callable[[], object]) -> int:
    """Count the lines that the room runs, loops over matches among them."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        ours = frame.f_code.co_filename == extraction.__file__  # not what the garbage collector runs in between
        count += ours and event == "line"
        return trace if ours else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join), st.sampled_from(["boxed", "lenient"]))
@settings(max_examples=60, deadline=None)
def test_steps_grow_with_the_length_of_a_response_and_no_faster(piece, answer_format):
    counts = [steps(lambda n=n: extract_answer(piece * n + "5", answer_format)) for n in (20, 40, 80)]
    assert counts[2] - counts[1] <= 2 * (counts[1] - counts[0]) + 8


@pytest.mark.parametrize(
    "module", [extraction, exact, letter_choice, knights_knaves], ids=lambda module: module.__name__
)
def test_no_pattern_scans_the_same_text_from_every_place(module):
    """A pattern that begins with an unbounded repeat of what it then misses takes the square of the length."""
    patterns = {name: value for name, value in vars(module).items() if isinstance(value, re.Pattern)}
    assert patterns
    for name, pattern in patterns.items():
        first = re._parser.parse(pattern.pattern, pattern.flags)[0]
        assert not (first[0] is re._constants.MAX_REPEAT and first[1][1] is re._constants.MAXREPEAT), name


@pytest.mark.parametrize("piece", PIECES)
def test_a_million_characters_are_read(piece):
    """With a search from every place that scans to the end, these would take hours."""
    text = piece * (1_000_000 // len(piece))
    for answer_format in ("boxed", "lenient"):
        extract_answer(text + "x", answer_format)
    trim(text + "x" + text)
