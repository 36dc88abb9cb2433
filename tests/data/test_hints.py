"""Prompts with hints: right and wrong siblings under one template, cut to fit, the problem never lost."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_tokenizers import PROBLEM, byte_tokenizer

from megatron_hdpo.data.checked import ProblemChecker
from megatron_hdpo.data.prompts import Hint, PromptBuilder, PromptConfig, PromptTooLong
from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.problem import Problem

BYTES = byte_tokenizer()
TEXTS = st.text(alphabet="ab \N{EURO SIGN}\n<|end>", max_size=300)


def builder(**config) -> PromptBuilder:
    return PromptBuilder(BYTES, PromptConfig(**config))


def text_of(prompts: PromptBuilder, hint: Hint) -> str:
    return BYTES.decode(prompts.hinted(PROBLEM, hint))


def test_right_and_wrong_siblings_differ_in_nothing_but_themselves() -> None:
    right, wrong = Hint("two and two make 4", "4"), Hint("I say five of them", "55")
    prompts = builder()
    texts = [text_of(prompts, hint) for hint in (right, wrong)]
    frames = [
        text.replace(hint.attempt, "#").replace(f"answer: {hint.answer}", "@")
        for text, hint in zip(texts, (right, wrong), strict=True)
    ]
    assert frames[0] == frames[1] and frames[0].count("#") == frames[0].count("@") == 1
    assert right.attempt in texts[0] and "answer: 4\n" in texts[0] and "answer: 55\n" in texts[1]
    assert "rejected" not in texts[0]


def test_the_truth_is_not_shown_beside_a_hint() -> None:
    problem = dataclasses.replace(PROBLEM, answer="8888", solution="so it is 8888")
    assert "8888" not in BYTES.decode(builder().hinted(problem, Hint("it is 5", "5", "try again")))


def test_feedback_with_and_without_a_sibling() -> None:
    prompts = builder()
    both, alone = text_of(prompts, Hint("it is 4", feedback="5 is odd")), text_of(prompts, Hint(feedback="5 is odd"))
    assert "it is 4" in both and "said of it:\n5 is odd\n" in both and "Final answer:" not in both
    assert "said of it:\n5 is odd\n" in alone and "[REFERENCE]" not in alone and alone.endswith("assistant\n")


def test_templates_are_the_recipes(tmp_path) -> None:
    path = tmp_path / "hint.jinja"
    path.write_text("{{ attempt }};{{ question }}")
    config = PromptConfig(hint=str(path))
    assert ">user\n17;What is 2+2?<" in PromptBuilder(BYTES, config).render_hinted(PROBLEM, Hint("17"))
    assert config.hint_shows == {"attempt", "question"}
    assert PromptConfig().hint_shows >= {"attempt", "answer", "feedback", "question"}


@settings(deadline=None, max_examples=60)
@given(TEXTS, TEXTS, TEXTS, st.integers(0, 500), st.sampled_from(["end", "beginning"]))
def test_what_does_not_fit_is_cut_and_the_problem_kept(attempt, answer, feedback, room, keep) -> None:
    limit = len(builder().hinted(PROBLEM, Hint())) + room
    prompts = builder(max_privileged_tokens=limit, hint_keep=keep)
    hint = Hint(attempt, answer, feedback)
    ids = prompts.hinted(PROBLEM, hint)
    text = BYTES.decode(ids)
    whole = builder(max_privileged_tokens=10_000)
    assert prompts.hinted_prompt(PROBLEM, hint).lost == len(whole.hinted(PROBLEM, hint)) - len(ids) >= 0
    assert len(ids) <= limit and "What is 2+2?" in text and text.endswith("<|start|>assistant\n")
    assert ids.tolist().count(BYTES.eos_token_id) == 1  # what a hint spells out is no token in the prompt
    if len(whole.hinted(PROBLEM, hint)) <= limit:
        assert text == text_of(whole, hint)


@pytest.mark.parametrize(("keep", "kept", "lost"), [("end", "it is 4", "begin"), ("beginning", "begin", "it is 4")])
def test_which_part_of_an_attempt_stays(keep, kept, lost) -> None:
    hint = Hint("begin " + "so " * 300 + "it is 4", "4", "wrong")
    text = text_of(builder(max_privileged_tokens=700, hint_keep=keep), hint)
    assert kept in text and lost not in text and "Final answer: 4" in text and "said of it:\nwrong" in text


def test_the_attempt_is_cut_before_the_feedback_and_that_before_the_answer() -> None:
    bare = len(builder().hinted(PROBLEM, Hint()))
    text = text_of(builder(max_privileged_tokens=bare + 120), Hint("x" * 300, "4", "early " + "y" * 300 + " late"))
    assert "xx" not in text and "early" in text and "late" not in text


def test_a_long_sibling_is_not_cut_silently() -> None:
    """18,000 tokens in the room of 2,048."""
    prompt = builder().hinted_prompt(PROBLEM, Hint("so " * 6000 + "it is 4", "4"))
    assert len(prompt.ids) <= 2048 and prompt.lost > 16_000 - len(builder().hinted(PROBLEM, Hint()))


@given(st.lists(st.integers(0, 400), min_size=1, max_size=8), st.integers(0, 300))
@settings(deadline=None, max_examples=30)
def test_solutions_that_are_cut_are_counted_at_load(lengths: list[int], room: int) -> None:
    limit = len(builder(max_privileged_tokens=9999).privileged_prompt(PROBLEM)) + room
    prompts, whole = builder(max_privileged_tokens=limit), builder(max_privileged_tokens=9999)
    made = [dataclasses.replace(PROBLEM, id=f"t/{i}", solution="x" * n or None) for i, n in enumerate(lengths)]

    class Task:
        task_name = PROBLEM.task

        def problems(self, report: LoadReport) -> list[Problem]:
            return made

    report = ProblemChecker(prompts, dict).check(Task()).report  # type: ignore[arg-type]
    cut = sum(len(whole.privileged_prompt(problem)) > limit for problem in made)
    assert report.cut == ({PROBLEM.task: cut} if cut else {})
    said = [line for line in report.lines() if "do not fit data.prompts.max_privileged_tokens" in line]
    assert len(said) == bool(cut)
    other = LoadReport()
    other.merge(report)
    assert other.cut == report.cut
    assert not ProblemChecker(prompts, dict, privileged=False).check(Task()).report.cut  # type: ignore[arg-type]


def test_a_problem_that_does_not_fit_is_refused_and_the_quick_check_agrees() -> None:
    bare = len(builder().hinted(PROBLEM, Hint()))
    fits, small = builder(max_privileged_tokens=bare), builder(max_privileged_tokens=bare - 1)
    fits.check_length(PROBLEM, privileged=False, hints=True)
    small.check_length(PROBLEM, privileged=False)
    for call in (lambda: small.hinted(PROBLEM, Hint("a")), lambda: small.check_length(PROBLEM, False, hints=True)):
        with pytest.raises(PromptTooLong, match=f"has {bare} tokens without any hint, the limit is {bare - 1}"):
            call()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hint": "{{ question }} {{ solution }}"}, "unknown variables: solution; it may use: answer, attempt, feed"),
        ({"hint": "{{ attempt }}"}, "does not use the variable question"),
        ({"hint": "{{ question }} {{ answer }}"}, "uses neither attempt nor feedback"),
        ({"hint": "{{ question"}, r"does not parse: .* \(its line 1\)"),
        ({"hint": "none/such.jinja"}, "cannot read the file none/such.jinja"),
        ({"hint_keep": "middle"}, "'end' or 'beginning'"),
    ],
)
def test_wrong_templates_are_refused(config, message) -> None:
    with pytest.raises(ValidationError, match=message):
        PromptConfig(**config)
