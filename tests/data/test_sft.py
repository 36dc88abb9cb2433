"""Supervised batches: solutions as responses, an end of sequence, the asked share of privileged prompts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tiny_tokenizers import PROBLEM, byte_tokenizer, character_tokenizer

from megatron_hdpo.data.prompts import PromptBuilder, PromptConfig
from megatron_hdpo.data.sft import SupervisedData
from megatron_hdpo.types.errors import DataError

TOKENIZER = byte_tokenizer()
PROMPTS = PromptBuilder(TOKENIZER, PromptConfig())
PROBLEMS = [dataclasses.replace(PROBLEM, id=f"t/{i}", question=f"{i}?", solution=f"\\boxed{{{i}}}") for i in range(30)]


def test_examples_are_prompt_solution_and_end():
    for example in SupervisedData(PROBLEMS, PROMPTS, 0.5, seed=1).batch(2, 10):
        expected = PROMPTS.privileged_prompt if example.privileged else PROMPTS.student
        assert np.array_equal(example.prompt_ids, expected(example.problem))
        assert example.response_ids.dtype == np.int32 and example.response_ids[-1] == TOKENIZER.eos_token_id
        assert TOKENIZER.decode(example.response_ids[:-1]) == example.problem.solution


def test_batches_depend_on_seed_and_step_alone():
    def key(step, seed=1):
        return [(e.problem.id, e.privileged) for e in SupervisedData(PROBLEMS, PROMPTS, 0.4, seed=seed).batch(step, 12)]

    assert key(5) == key(5) != key(6)
    assert key(5) != key(5, seed=2)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_privileged_prompts_holds_on_average(share):
    data = SupervisedData(PROBLEMS, PROMPTS, share)
    flags = [e.privileged for step in range(200) for e in data.batch(step, 5)]
    assert np.mean(flags) == pytest.approx(share, abs=0.03)
    assert all(abs(sum(flags[i : i + 5]) - 5 * share) < 1 for i in range(0, 1000, 5))


def test_problems_without_a_short_solution_are_left_out():
    problems = [
        *PROBLEMS,
        dataclasses.replace(PROBLEM, id="long"),
        dataclasses.replace(PROBLEM, id="none", solution=None),
    ]
    data = SupervisedData(problems, PROMPTS, max_response_tokens=12)
    assert data.left_out == 2
    assert all(len(e.response_ids) <= 12 for e in data.batch(0, 30))


@pytest.mark.parametrize(
    ("problems", "config", "message"),
    [
        (PROBLEMS, {"privileged_share": 1.5}, "between 0 and 1"),
        (PROBLEMS, {"max_response_tokens": 3}, "none of 30 problems has a worked solution of at most 3 tokens"),
        ([dataclasses.replace(PROBLEM, solution=None)], {}, "none of 1 problems has a worked solution"),
    ],
)
def test_wrong_input_is_refused(problems, config, message):
    with pytest.raises(DataError, match=message):
        SupervisedData(problems, PROMPTS, **config)


def test_solutions_that_the_tokenizer_does_not_know_are_errors():
    prompts = PromptBuilder(
        character_tokenizer("0123456789?"),
        PromptConfig(chat=False, student="{{ question }}", privileged="{{ answer }}{{ question }}"),
    )
    with pytest.raises(DataError, match="no token for some characters of this solution"):
        SupervisedData(PROBLEMS, prompts)
