"""Where the final answer of a response is: a table of cases, and properties of the brace matching."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hdpo.rewards.extraction import extract_answer, last_boxed

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


@pytest.mark.parametrize("response", ["", "\n \n", r"\boxed{3} then \boxed{5", "<think>the answer is 5"])
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
