"""What the prompts say, that the problem survives every length limit, and that wrong templates are refused at once."""

from __future__ import annotations

import dataclasses
from datetime import datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_tokenizers import CHAT_TEMPLATE, PROBLEM, byte_tokenizer, character_tokenizer
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from megatron_hdpo.data import trial
from megatron_hdpo.data.prompts import Hint, PromptBuilder, PromptConfig, PromptTooLong
from megatron_hdpo.types.errors import DataError

BYTES = byte_tokenizer()


def builder(tokenizer=BYTES, **config):
    return PromptBuilder(tokenizer, PromptConfig(**config))


def test_chat_prompts_end_where_the_assistant_begins():
    prompts = builder(system="Be brief.", student="Q: {{ question }}")
    text = prompts.render_student(PROBLEM)
    assert text == "<|start|>system\nBe brief.<|end|>\n<|start|>user\nQ: What is 2+2?<|end|>\n<|start|>assistant\n"
    ids = prompts.student(PROBLEM)
    assert ids.dtype == np.int32 and BYTES.decode(ids) == text
    assert list(ids).count(BYTES.eos_token_id) == 2 and ids[0] == BYTES.convert_tokens_to_ids("<|start|>")


def test_chat_template_variables_are_passed_on():
    assert builder(chat_template_kwargs={"enable_thinking": False}).render_student(PROBLEM).endswith("<think></think>")


THINKS = "{% if enable_thinking %}<think>\n{% else %}<think></think>{% endif %}"
FOR_TWO = CHAT_TEMPLATE.partition("{% if enable_thinking")[0] + "{{ date_string }}" + THINKS


def test_a_teacher_may_think_where_the_student_does_not():
    """OPSD: the student's template arguments count for its own prompts alone; a pinned date holds for both."""
    prompts = builder(
        with_template(FOR_TWO),
        chat_template_kwargs={"enable_thinking": False, "date_string": "May"},
        privileged_chat_template_kwargs={"enable_thinking": True},
    )
    taught = [prompts.render_privileged(PROBLEM), prompts.render_hinted(PROBLEM, Hint("it is 4"))]
    assert prompts.render_student(PROBLEM).endswith("assistant\nMay<think></think>")
    assert all(text.endswith("assistant\nMay<think>\n") for text in taught)
    ids = [prompts.privileged_prompt(PROBLEM), prompts.hinted(PROBLEM, Hint("it is 4"))]
    assert [BYTES.decode(each) for each in ids] == taught
    assert BYTES.decode(prompts.student(PROBLEM)) == prompts.render_student(PROBLEM)
    cut = builder(
        with_template(FOR_TWO), privileged_chat_template_kwargs={"enable_thinking": True}, max_privileged_tokens=500
    )
    long = dataclasses.replace(PROBLEM, solution="so " * 500)
    assert BYTES.decode(cut.privileged_prompt(long)).endswith("<think>\n") and not cut.check_length(long, True)


def test_both_sets_of_variables_are_checked_against_the_template():
    for key in ("chat_template_kwargs", "privileged_chat_template_kwargs"):
        with pytest.raises(DataError, match=f"^data.prompts.{key}: the .* template does not read enable_thinkin; it"):
            builder(**{key: {"enable_thinkin": False}})
        with pytest.raises(ValidationError, match=f"{key}: raw prompts have no chat template"):
            PromptConfig(chat=False, **{key: {"enable_thinking": False}})
    with pytest.raises(DataError, match="leaves out the question"):
        gone = "{% if enable_thinking %}{{ messages[0].role }}{% else %}" + CHAT_TEMPLATE + "{% endif %}"
        builder(with_template(gone), privileged_chat_template_kwargs={"enable_thinking": True})


def test_raw_prompts_are_the_template_alone():
    prompts = builder(byte_tokenizer(chat=False), chat=False, student="{{ question }}=")
    assert prompts.render_student(PROBLEM) == "What is 2+2?="
    assert BYTES.decode(prompts.student(PROBLEM)) == "What is 2+2?="


@pytest.mark.parametrize(
    ("context", "solution", "holds_solution", "holds_answer"),
    [
        ("both", True, True, True),
        ("both", False, False, True),
        ("answer", True, False, True),
        ("answer", False, False, True),
        ("solution", True, True, False),
        ("solution", False, False, True),
    ],
)
def test_privileged_context(context, solution, holds_solution, holds_answer):
    problem = PROBLEM if solution else dataclasses.replace(PROBLEM, solution=None)
    text = builder(privileged_context=context).render_privileged(problem)
    assert ("2+2 = 4, so" in text) == holds_solution
    assert ("Final answer: 4" in text) == holds_answer
    assert text.index("What is 2+2?") < text.index("[REFERENCE]") < text.index("[END OF REFERENCE]")
    assert "without mentioning the reference" in text


def test_the_student_sees_nothing_of_the_truth():
    text = builder().render_student(PROBLEM)
    assert "2+2 = 4" not in text and "REFERENCE" not in text and "Final answer: 4" not in text


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="ab \N{EURO SIGN}\n", min_size=1, max_size=400), st.integers(0, 450))
def test_a_long_solution_is_cut_and_the_problem_kept(solution, room):
    short = dataclasses.replace(PROBLEM, solution=None)
    limit = len(builder().privileged_prompt(short)) + room
    prompts = builder(max_privileged_tokens=limit)
    problem = dataclasses.replace(PROBLEM, solution=solution)
    ids = prompts.privileged_prompt(problem)
    text = BYTES.decode(ids)
    assert len(ids) <= limit
    assert "What is 2+2?" in text and "Final answer: 4" in text and text.endswith("<|start|>assistant\n")
    kept = text.partition("[REFERENCE]\n")[2].partition("Final answer")[0].strip()
    assert solution.strip().startswith(kept)
    if len(builder(max_privileged_tokens=10_000).privileged_prompt(problem)) <= limit:
        assert text == builder().render_privileged(problem)


def test_a_cut_solution_brings_the_answer_also_where_only_the_solution_was_asked_for():
    problem = dataclasses.replace(PROBLEM, solution="so " * 200 + "it is 4")
    assert "Final answer: 4" in BYTES.decode(
        builder(privileged_context="solution", max_privileged_tokens=600).privileged_prompt(problem)
    )


def test_too_long_prompts_are_refused_and_the_quick_check_agrees():
    student, privileged = (
        len(builder().student(PROBLEM)),
        len(builder().privileged_prompt(dataclasses.replace(PROBLEM, solution=None))),
    )
    fits = builder(max_prompt_tokens=student, max_privileged_tokens=privileged)
    fits.check_length(PROBLEM, privileged=True)
    with pytest.raises(
        PromptTooLong, match=rf"t/1: the prompt has {student} tokens, max_prompt_tokens is {student - 1}"
    ):
        builder(max_prompt_tokens=student - 1).student(PROBLEM)
    with pytest.raises(PromptTooLong):
        builder(max_prompt_tokens=student - 1).check_length(PROBLEM, privileged=False)
    small = builder(max_privileged_tokens=privileged - 1)
    small.check_length(PROBLEM, privileged=False)
    for call in (small.privileged_prompt, lambda problem: small.check_length(problem, privileged=True)):
        with pytest.raises(PromptTooLong, match="without any solution"):
            call(PROBLEM)


def test_text_that_the_tokenizer_does_not_know_is_an_error():
    tokenizer = character_tokenizer("0123456789+=")
    prompts = builder(tokenizer, chat=False, student="{{ question }}", privileged="{{ solution }};{{ question }}")
    problem = dataclasses.replace(PROBLEM, question="3+4=", solution="7")
    assert tokenizer.decode(prompts.student(problem)) == "3+4="
    with pytest.raises(DataError, match="no token for some characters of this prompt: '7;3"):
        prompts.privileged_prompt(problem)


def test_a_special_token_in_a_question_is_found():
    assert builder().control_token(PROBLEM) is None
    problem = dataclasses.replace(PROBLEM, question="What does <|end|> do?")
    assert builder().control_token(problem) == "<|end|>"


def test_templates_come_from_files(tmp_path):
    path = tmp_path / "student.jinja"
    path.write_text("From a file: {{ question }}")
    assert "From a file: What is 2+2?" in builder(student=str(path)).render_student(PROBLEM)


@pytest.mark.parametrize("name", ["system.txt", "system.md", "Système.TXT", "system.jinja"])
def test_a_system_message_comes_from_a_file(tmp_path, monkeypatch, name):
    (tmp_path / name).write_text("Be brief.\n\nBe right.\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = PromptConfig(system=name)
    assert config.system == "Be brief.\n\nBe right."
    assert PromptConfig(**config.model_dump()) == config
    assert "Be brief." in builder(system=name).render_student(PROBLEM)


@pytest.mark.parametrize("text", ["/no_think", "Answer like system.txt", "Be brief.", "Say\nx.txt", "Version 1.5"])
def test_a_system_message_that_names_no_file_is_literal(text):
    assert PromptConfig(system=text).system == text


@pytest.mark.parametrize(
    ("content", "message"), [(b"", r"s\.md is empty"), (b"\n \n", "is empty"), (b"\xff", r"s\.md is not UTF-8 text")]
)
def test_system_messages_without_text_are_refused(tmp_path, content, message):
    (tmp_path / "s.md").write_bytes(content)
    with pytest.raises(ValidationError, match=message):
        PromptConfig(system=str(tmp_path / "s.md"))


def test_raw_prompts_have_no_system_message():
    with pytest.raises(ValidationError, match="raw prompts have no system message"):
        PromptConfig(system="Be brief.", chat=False)


@pytest.mark.parametrize(
    ("key", "template", "message"),
    [
        ("student", "{{ question }} {{ answer }}", "unknown variables: answer; it may use: question"),
        ("student", "{{ qestion }}", "unknown variables: qestion"),
        ("student", "Solve this.", "does not use the variable question"),
        ("student", "{{ question", r"does not parse: .* \(its line 1\)"),
        ("privileged", "{{ question }} {{ solutions }}", "unknown variables: solutions"),
        ("privileged", "no/such/file.jinja", "cannot read the file no/such/file.jinja: No such file"),
        ("student", "prompts/student.md", r"cannot read the file prompts/student\.md: No such file .*relative to /"),
        ("hint", "hint.txt", r"cannot read the file hint\.txt"),
        ("system", "system.txt", r"cannot read the file system\.txt: No such file"),
        ("reference_begin", "", "at least 1 character"),
        ("max_prompt_tokens", 0, "greater than or equal to 1"),
        ("date", "2025-02-30", r"'2025-02-30' is no day as YYYY-MM-DD"),
        ("date", "today", "is no day as YYYY-MM-DD"),
        ("chatt", True, "Extra inputs are not permitted"),
    ],
)
def test_wrong_configurations_are_refused(key, template, message):
    with pytest.raises(ValidationError, match=message):
        PromptConfig(**{key: template})


def test_chat_needs_a_chat_template():
    with pytest.raises(DataError, match=r"data\.prompts\.chat is true, but the tokenizer has no chat template"):
        builder(byte_tokenizer(chat=False))


def test_templates_run_in_a_sandbox():
    with pytest.raises(DataError, match=r"cannot be rendered: access to attribute '__class__' .* is unsafe"):
        builder(student="{{ question.__class__.__mro__ }}")


def with_template(source: object) -> object:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    return tokenizer


PARTS = "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ messages[-1].content }}"
)
GENERATION = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        (PARTS, {}, "chat template leaves out the question .* it makes 'user:'"),
        ("always the same", {}, "leaves out the question"),
        ("{{ messages[-1].content | e }}", {}, r"or changes it .* it makes 'Is .*&lt; &#34;3&#34; &amp;"),
        ("{{ messages[-1].content | tojson }}", {}, "leaves out the question or changes it"),
        ("{{ messages[-1].content | urlencode }}", {}, "leaves out the question or changes it"),
        ("{{ messages[-1].content | upper }}", {}, "leaves out the question or changes it"),
        ("{{ messages[-1].content | truncate(20) }}", {}, "leaves out the question or changes it"),
        (NO_SYSTEM, {"system": "Be brief."}, "leaves out the system message: leave data.prompts.system out"),
        (REFUSES_SYSTEM, {"system": "Be brief."}, "System role not supported: it takes no system message"),
        ("{{ messages[0].content", {}, r"does not parse: .* \(its line 1\)"),
        ("{% for m in messages %}\n{% enfor %}", {}, r"does not parse: .* \(its line 2\)"),
        ({"rag": CHAT_TEMPLATE, "tool": CHAT_TEMPLATE}, {}, "cannot be used: .*multiple chat templates"),
        ("{{ messages[7].content }}", {}, "cannot be rendered: "),
        ("{{ messages[0].content + 1 }}", {}, "cannot be rendered: "),
        ("{{ 1 / 0 }}", {}, "cannot be rendered: division by zero"),
        ("{% include 'x' %}", {}, "cannot be rendered: no loader"),
        ("{{ messages[0].content * 10000 }}", {}, "makes .* characters of a question of a few words"),
        ("{{ messages[0].content * 10 ** 9 }}", {}, r"computes a power \(\*\*\) in its line 1"),
        ("{{ messages[0].content.center(10000000000) }}", {}, "cannot be rendered: MemoryError"),
        (
            CHAT_TEMPLATE,
            {"chat_template_kwargs": {"enable_thinkin": False}},
            "chat_template_kwargs: the .* template does not read enable_thinkin; it reads: enable_thinking",
        ),
        (
            CHAT_TEMPLATE,
            {"chat_template_kwargs": {"add_generation_prompt": False}},
            "does not read add_generation_prompt",
        ),
        (CHAT_TEMPLATE, {"chat_template_kwargs": {"tokenize": True}}, "does not read tokenize"),
        (
            "{{ strftime_now('%d') }}{{ messages[-1].content }}",
            {"chat_template_kwargs": {"strftime_now": "1 May"}},
            "does not read strftime_now",
        ),
    ],
)
def test_chat_templates_that_cannot_be_used(source, config, message):
    with pytest.raises(DataError, match=message) as refused:
        builder(with_template(source), **config)
    assert "\n" not in str(refused.value)


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_templates_that_never_end_are_stopped(monkeypatch):
    monkeypatch.setattr(trial, "_SECONDS", 0.1)
    with pytest.raises(
        DataError, match=r"chat template cannot be rendered: it takes more than 0\.1 s of processor time"
    ):
        builder(with_template(LOOPS + CHAT_TEMPLATE))
    with pytest.raises(DataError, match=r"data\.prompts\.student: .* it takes more than 0\.1 s of processor time"):
        builder(student=LOOPS + "{{ question }}")


def test_tags_of_transformers_are_read():
    assert "What is 2+2?" in builder(with_template(GENERATION)).render_student(PROBLEM)


DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today: {{ date_string }} {{ messages[-1].content }}"
)


def every_prompt(**config):
    """The student's, the privileged and the hinted prompt of a builder that is made anew, as at a resume."""
    prompts = builder(with_template(DATED), system=None, **config)
    found = prompts.student(PROBLEM), prompts.privileged_prompt(PROBLEM), prompts.hinted(PROBLEM, Hint("it is 4"))
    return [BYTES.decode(ids) for ids in found]


def test_prompts_are_the_same_on_every_day(monkeypatch):
    """Llama 3's template asks for today's date."""
    before = every_prompt()

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 12, 24)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    messages = [{"role": "user", "content": "x"}]
    assert "24 Dec 2031" in with_template(DATED).apply_chat_template(messages, tokenize=False)
    assert every_prompt() == before and all(text.startswith("Today: 01 Jan 2025 What is 2+2?") for text in before)
    assert all(text.startswith("Today: 09 May 2026 ") for text in every_prompt(date="2026-05-09"))
    assert all(text.startswith("Today: 1 May ") for text in every_prompt(chat_template_kwargs={"date_string": "1 May"}))


@pytest.mark.parametrize(
    "source",
    [
        "{%- set day = '%d/%m' %}{{ strftime_now(format=day) }} {{ messages[-1].content }}",
        "\n  {% if strftime_now is defined %}{{ strftime_now('%d/%m') }}{% endif %}\n {{ messages[-1].content }}",
        "{% macro when() %}{{ strftime_now('%d/%m') }}{% endmacro %}{{ when() }} {{ messages[-1].content }}",
    ],
)
def test_dates_of_other_templates(source):
    """The text around the date is what transformers makes of it."""
    tokenizer = with_template(source)
    theirs = tokenizer.apply_chat_template([{"role": "user", "content": "What is 2+2?"}], tokenize=False)
    ours = builder(tokenizer, student="{{ question }}").render_student(PROBLEM)
    assert ours == theirs.replace(datetime.now().strftime("%d/%m"), "01/01")


def test_a_date_whose_format_is_not_known():
    with pytest.raises(DataError, match=r"format %u, which it computes: set the date by data\.prompts\.chat_template"):
        builder(with_template("{{ strftime_now('%' ~ messages[-1].role[0]) }}{{ messages[-1].content }}"))


def test_a_template_with_a_date_is_said():
    (note,) = builder(with_template(DATED), date="2026-05-09").notes()
    assert "a date into every prompt" in note and "gets 2026-05-09 (data.prompts.date)" in note
    pinned = builder(with_template(DATED), chat_template_kwargs={"date_string": "1 May 2025"})
    assert pinned.notes() == [] and "Today: 1 May 2025 What is 2+2?" in pinned.render_student(PROBLEM)
    assert builder().notes() == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ question + 1 }}", "data.prompts.student: the template cannot be rendered: can only concatenate str"),
        ("{{ question }}{{ 1/0 }}", "cannot be rendered: division by zero"),
        ("{{ question }}{% include 'x' %}", "cannot be rendered: no loader"),
        ("{{ question }}{{ range(1000000) | list }}", "cannot be rendered: Range too big"),
        ("{{ question|round }}", "cannot be rendered: "),
        ("{{ question * 100000 }}", "data.prompts.student: the template cannot be used: it makes 2,"),
        ("{{ question.center(10000000000) }}", "cannot be rendered: MemoryError"),
        ("{{ question[:3] }}", "data.prompts.student: the question is missing in what the template makes: '<|start|>"),
        ("{% if question is number %}{{ question }}{% endif %}", "the question is missing"),
    ],
)
def test_templates_that_fail_when_they_are_tried(template, message):
    with pytest.raises(DataError) as refused:
        builder(student=template)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ question * 10 ** 9 }}", r"the template cannot be used: it computes a power \(\*\*\) in its line 1"),
        ("{{ " + "(" * 5000 + "question" + ")" * 5000 + " }}", "nested too deep"),
        ("{{ question | nofilter }}", "does not parse: No filter named 'nofilter'"),
    ],
)
def test_templates_that_are_refused_before_anything_is_loaded(template, message):
    with pytest.raises(ValidationError, match=message):
        PromptConfig(student=template)


def test_a_template_that_fails_for_one_problem_names_it():
    prompts = builder(student="{{ question }}{{ 1 / (question|length - 1) }}")
    with pytest.raises(DataError, match=r"t/1: data\.prompts\.student: the template cannot be rendered: division"):
        prompts.student(dataclasses.replace(PROBLEM, question="q"))


def test_control_tokens_are_found_also_where_they_are_not_flagged():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("   ", special=False), "[INST]", "frac"])
    tokenizer.chat_template = "[INST] " + CHAT_TEMPLATE
    prompts = builder(tokenizer)
    for text in ("<tool_call>", "[INST]", "<|start|>"):
        assert prompts.control_token(dataclasses.replace(PROBLEM, question=f"a {text} b")) == text
    assert prompts.control_token(dataclasses.replace(PROBLEM, question="a   frac")) is None
    ids = prompts.hinted(PROBLEM, Hint("ke<tool_<tool_call>call>pt"))
    assert "ke<tool_<tool_call>call>pt" in tokenizer.decode(ids)
    assert tokenizer.convert_tokens_to_ids("<tool_call>") not in ids


def test_tokens_beyond_the_model_are_refused():
    rows = len(BYTES.get_vocab())
    assert not PromptBuilder(BYTES, PromptConfig(), rows).may_lack_tokens
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["zebra"])
    prompts = PromptBuilder(tokenizer, PromptConfig(), rows)
    assert prompts.may_lack_tokens and len(prompts.student(PROBLEM))
    with pytest.raises(
        DataError, match=rf"token {rows} \('zebra'\) of this prompt is beyond the model's vocabulary of"
    ):
        prompts.student(dataclasses.replace(PROBLEM, question="a zebra"))


def test_characters_that_a_tokenizer_leaves_out_are_refused():
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate("abcdefg")}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    prompts = builder(tokenizer, chat=False, student="{{ question }}", privileged="{{ question }}{{ answer }}")
    assert prompts.may_lack_tokens
    assert len(prompts.student(dataclasses.replace(PROBLEM, question="abc"))) == 3
    with pytest.raises(DataError, match="the tokenizer has no token for 'x' and leaves it out of the prompt 'axb'"):
        prompts.student(dataclasses.replace(PROBLEM, question="axb"))
