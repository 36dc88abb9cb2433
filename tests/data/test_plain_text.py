"""Control tokens that data spells are ordinary characters, and those of the template stay tokens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHAT_TEMPLATE, PROBLEM, byte_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_hdpo.data.config import DataConfig
from megatron_hdpo.data.load import load
from megatron_hdpo.data.prompts import Hint, PromptBuilder, PromptConfig
from megatron_hdpo.data.sft import response_ids
from megatron_hdpo.rewards.config import RewardConfig
from megatron_hdpo.rewards.pool import RewardPool

EXTRA = [
    AddedToken("<tool_call>", special=False),
    AddedToken("<|header|>", special=True),
    AddedToken("[INST]", special=False),
    AddedToken("<think>", special=False, rstrip=True),
    AddedToken("   ", special=False),
]
TEXT = ["one plus two <|end|> of <|start|>user says <tool_call> to the <think> [INST]", "what is it? It is 12.\n"] * 20
TEMPLATE = CHAT_TEMPLATE + "{% if add_generation_prompt %}<think>\n{% endif %}"


def byte_level() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(EXTRA)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def merged() -> Any:
    """A trained one that splits and merges as those of Qwen and Llama 3 do."""
    backend = Tokenizer(models.BPE(ignore_merges=True))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", additional_special_tokens=["<|start|>"]
    )
    tokenizer.add_tokens(EXTRA)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def pieces() -> Any:
    """One with pieces of text and its control tokens in one vocabulary, as that of Llama 2."""
    letters = [chr(code) for code in range(33, 127)]
    vocab = {
        text: i
        for i, text in enumerate(["<unk>", "<s>", "</s>", "\u2581", "\n", "\N{EURO SIGN}", *letters, "<s", "e\u2581"])
    }
    backend = Tokenizer(models.BPE(vocab, [("<", "s"), ("e", "\u2581")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def words() -> Any:
    """One whose model itself has a control token for a word of text."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "is": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


KINDS = {"bytes": byte_level(), "merged": merged()}
CONTROLS = ("<|end|>", "<|start|>", "<tool_call>", "<|header|>", "[INST]", "<think>")
PARTS = [
    *CONTROLS,
    "<|en",
    "d|>",
    "<",
    ">",
    "<|",
    "tool_call",
    " ",
    "   ",
    "\n",
    "a",
    "x ",
    "\N{EURO SIGN}",
    "\u00fc",
    "1",
]
SPELLED = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


def control_ids(tokenizer: Any) -> set[int]:
    return {tokenizer.convert_tokens_to_ids(text) for text in CONTROLS}


def without_added_tokens(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text by the parts of the tokenizer that know of no added token."""
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    splits = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
    return [token.id for part in splits for token in backend.model.tokenize(part)]


def counted(tokenizer: Any, ids: Any) -> int:
    return sum(int(token) in control_ids(tokenizer) for token in ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(question=SPELLED, solution=SPELLED, answer=SPELLED)
def test_the_control_tokens_of_a_prompt_are_those_of_the_template(
    kind: str, question: str, solution: str, answer: str
) -> None:
    tokenizer = KINDS[kind]
    prompts = PromptBuilder(
        tokenizer, PromptConfig(student="{{ question }}?", hint="{{ attempt }}{{ question }}{{ answer }}{{ feedback }}")
    )
    problem = dataclasses.replace(PROBLEM, question=question, answer=answer, solution=solution)
    harmless = dataclasses.replace(PROBLEM, question="a", answer="b", solution="c")
    hint = Hint(solution, answer, question)
    for found, text, plain in (
        (prompts.student(problem), prompts.render_student(problem), prompts.student(harmless)),
        (
            prompts.privileged_prompt(problem),
            prompts.render_privileged(problem),
            prompts.privileged_prompt(harmless),
        ),
        (prompts.hinted(problem, hint), prompts.render_hinted(problem, hint), prompts.hinted(harmless, Hint("a"))),
    ):
        assert counted(tokenizer, found) == counted(tokenizer, plain)
        assert tokenizer.decode(found, skip_special_tokens=False) == text.rstrip("\n")  # which <think> takes in
    assert question in prompts.render_student(problem)
    assert counted(tokenizer, response_ids(solution, prompts)[:-1]) == 0
    assert tokenizer.decode(response_ids(solution, prompts)[:-1], skip_special_tokens=False) == solution


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(question=SPELLED)
def test_the_text_has_the_tokens_of_a_tokenizer_without_added_tokens(kind: str, question: str) -> None:
    tokenizer = KINDS[kind]
    if "   " in question:  # an added token of blanks belongs to ordinary text
        question = question.replace("   ", "")
    prompts = PromptBuilder(tokenizer, PromptConfig(student="{{ question }}!"))
    found = prompts.student(dataclasses.replace(PROBLEM, question=question)).tolist()
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in CONTROLS}
    body = without_added_tokens(tokenizer, f"user\n{question}!")
    before, after = [ids["<|start|>"]], [ids["<|end|>"], *without_added_tokens(tokenizer, "\n"), ids["<|start|>"]]
    end = [*without_added_tokens(tokenizer, "assistant\n"), ids["<think>"]]
    assert found == [*before, *body, *after, *end]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("question", ["a <", "> b", "x <|en", "[ and ]", "d|>"])
def test_a_harmless_text_has_the_tokens_that_it_always_had(kind: str, question: str) -> None:
    tokenizer = KINDS[kind]
    prompts = PromptBuilder(tokenizer, PromptConfig(student="{{ question }}"))
    problem = dataclasses.replace(PROBLEM, question=question)
    whole = tokenizer.encode(prompts.render_student(problem), add_special_tokens=False)
    assert prompts.student(problem).tolist() == whole


def test_raw_prompts_keep_what_the_tokenizer_puts_before_them() -> None:
    tokenizer = pieces()
    prompts = PromptBuilder(
        tokenizer, PromptConfig(chat=False, student="{{ question }}", privileged="{{ question }}{{ answer }}")
    )
    problem = dataclasses.replace(PROBLEM, question="the <s> and </s> e f")
    assert prompts.can_encode(problem)
    ids = prompts.student(problem).tolist()
    assert ids == [1, *without_added_tokens(tokenizer, problem.question)] and 2 not in ids and ids.count(1) == 1
    assert prompts.student(PROBLEM).tolist() == tokenizer.encode(PROBLEM.question)


def test_a_tokenizer_that_makes_control_tokens_of_words_cannot() -> None:
    prompts = PromptBuilder(
        words(), PromptConfig(chat=False, student="{{ question }} is", privileged="{{ question }} {{ answer }}")
    )
    assert prompts.can_encode(dataclasses.replace(PROBLEM, question="is", answer="is", solution=None))
    assert not prompts.can_encode(dataclasses.replace(PROBLEM, question="is <eos> is"))


class Slow:
    """A tokenizer without a fast backend."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "backend_tokenizer":
            raise AttributeError(name)
        return getattr(self._inner, name)


def test_a_slow_tokenizer_loses_the_problem_and_the_text_of_the_hint() -> None:
    prompts = PromptBuilder(Slow(byte_level()), PromptConfig())  # type: ignore[arg-type]
    assert not prompts.can_encode(dataclasses.replace(PROBLEM, question="is <|end|> it"))
    assert len(prompts.student(dataclasses.replace(PROBLEM, question="is it <")))
    ids = prompts.hinted(PROBLEM, Hint("before <|end|>after"))
    assert "before after" in KINDS["bytes"].decode(ids)
    assert counted(KINDS["bytes"], ids) == counted(KINDS["bytes"], prompts.hinted(PROBLEM, Hint("x")))


@pytest.mark.parametrize("code", ["\ufdd0", "\ufdd1"])
def test_marks_of_our_own_in_data(code: str) -> None:
    prompts = PromptBuilder(KINDS["merged"], PromptConfig())
    assert not prompts.can_encode(dataclasses.replace(PROBLEM, question=f"a {code} b"))
    ids = prompts.hinted(PROBLEM, Hint(f"so <{code}|end|> and <|end|>"))
    assert "so <|end|> and <|end|>" in KINDS["merged"].decode(ids)
    assert counted(KINDS["merged"], ids) == counted(KINDS["merged"], prompts.hinted(PROBLEM, Hint("x")))


@settings(deadline=None, max_examples=20)
@given(attempt=SPELLED.map(lambda text: 8 * text), room=st.integers(0, 200))
def test_a_hint_that_is_cut_spells_no_control_token(attempt: str, room: int) -> None:
    tokenizer = KINDS["merged"]
    bare = PromptBuilder(tokenizer, PromptConfig()).hinted(PROBLEM, Hint())
    prompts = PromptBuilder(tokenizer, PromptConfig(max_privileged_tokens=len(bare) + room))
    ids = prompts.hinted(PROBLEM, Hint(attempt, "4"))
    assert len(ids) <= len(bare) + room and counted(tokenizer, ids) == counted(tokenizer, bare)


def test_loading_keeps_and_counts_such_problems(tmp_path: Path) -> None:
    rows = [("a", "1"), ("what is <|end|>?", "2"), ("b", "<tool_call>"), ("c \ufdd0", "4")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"problem": q, "answer": a}) + "\n" for q, a in rows))
    task = {"kind": "jsonl", "path": path, "scorer": "exact"}
    config = DataConfig.model_validate({"train": [task], "cache_dir": tmp_path / "cache"})
    with RewardPool([], RewardConfig(workers=1)) as pool:
        first, again = load(config, byte_level(), pool), load(config, byte_level(), pool)
    assert first.origins["rows"].fresh and not again.origins["rows"].fresh
    for data in (first, again):
        assert [problem.question for problem in data.train] == ["a", "what is <|end|>?", "b"]
        assert data.report.counts == {"rows": {"special token in its text": 1}}
        (line,) = [line for line in data.report.lines() if "ordinary characters" in line and "left out" not in line]
        assert line.startswith("rows: 2 with the text of a control token") and "rows/2 contains <|end|>" in line
