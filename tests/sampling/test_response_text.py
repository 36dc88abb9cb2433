"""Texts of responses: a judge sees where thoughts begin and end, whatever the prompt and the tokenizer hide."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest
from fake_engine import FakeEngine
from tiny_tokenizers import byte_tokenizer

from megatron_hdpo.rewards.judgement import Judgement
from megatron_hdpo.rewards.math import score_math
from megatron_hdpo.sampling.response_text import ResponseText
from megatron_hdpo.sampling.sampler import RolloutRequest, RolloutSampler
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import SamplingParams

SPECIAL = {"additional_special_tokens": ["<|start|>", "<think>", "</think>"]}


def tokenizer(marks_are_special: bool):
    made = byte_tokenizer()
    if marks_are_special:
        made.add_special_tokens(SPECIAL)
    return made


class Scorer:
    """Judges by `score_math` in this process, without a pool."""

    def submit(self, problem: Problem, response: str, tokens: int = 0) -> Future[Judgement]:
        future: Future[Judgement] = Future()
        future.set_result(Judgement(score_math(problem.answer, response), None, 0.0))
        return future


def ids(tokenizer, text: str) -> np.ndarray:
    return np.asarray(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<think>\\boxed{5}</think>the answer is six", 0.0),
        ("<think>or \\boxed{5}", 0.0),
        ("<think>six?</think>\\boxed{5}<|end|>", 1.0),
        ("\\boxed{5}<|end|>", 1.0),
    ],
)
def test_thoughts_stay_thoughts_where_their_marks_are_special_tokens(special, response, reward):
    made = tokenizer(special)
    text = ResponseText(made)(ids(made, response))
    assert text == response.removesuffix("<|end|>")
    assert score_math("5", text) == reward


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|start|>assistant\n<think>\n", "<think>\n"),
        ("<|start|>assistant\n<think>", "<think>"),
        ("<|start|>assistant\n", ""),
        ("<|start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("Where does a <think> begin?<|start|>assistant\n", ""),
        ("", ""),
    ],
)
def test_a_thought_that_the_prompt_opens_is_known(special, prompt, opened):
    made = tokenizer(special)
    assert ResponseText(made).opened_by(ids(made, prompt)) == opened


@pytest.mark.parametrize(("opened", "right"), [("<think>\n", 0.0), ("", 1.0)])
def test_judges_and_readers_get_what_the_prompt_opened(opened, right):
    """A response cut off inside of its thought, with a guess in a box, has not answered."""
    made = byte_tokenizer()
    text = ResponseText(made)
    sampler = RolloutSampler(FakeEngine(), Scorer(), lambda _: "perhaps \\boxed{5}", opened_by=text.opened_by)
    problem = Problem(id="t/0", task="t", question="?", answer="5")
    prompt = ids(made, "<|start|>assistant\n" + opened)
    samples = sampler.sample([RolloutRequest("a", problem, prompt, SamplingParams(8, n=2), 7)])["a"].samples
    assert [(sample.text, sample.reward) for sample in samples] == [(f"{opened}perhaps \\boxed{{5}}", right)] * 2
