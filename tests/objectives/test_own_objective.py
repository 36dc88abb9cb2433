"""The example objective of docs/adding-an-objective.md: its numbers, and its gradients against float64."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from documents import files_of
from method_gradients import (
    Case,
    Models,
    assert_same_gradients,
    hand_made_groups,
    make_models,
    reference_gradients,
    run_cases,
)
from torch import Tensor

from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.planner.asked_work import Steps, work_of
from megatron_hdpo.types.learning import Objective
from megatron_hdpo.types.plugins import LoadedReference, module_of_source

TEMPERATURE = 0.8
LAYOUTS = ["one_rank", "tp2_dp2"]


def page() -> ModuleType:
    """The code of the page, as a module."""
    code = files_of("adding-an-objective.md")["my-lab/rejection.py"]
    return module_of_source("rejection_of_the_page", "rejection.py", code.encode())


def rejection() -> Objective:
    return page().Rejection(page().RejectionConfig(), ObjectiveDeps(TEMPERATURE))


def likelihood_of_right_answers(models: Models) -> Tensor:
    """Minus the mean log-likelihood of the tokens of right responses."""
    total, count = torch.zeros(()).double(), 0
    for group in hand_made_groups():
        for sample in group.samples:
            ids = torch.from_numpy(sample.completion.token_ids).long()
            if sample.reward == 1.0:
                logits = models.student(group.prompt_ids, sample.completion.token_ids)
                total = total - torch.log_softmax(logits / TEMPERATURE, -1)[torch.arange(len(ids)), ids].sum()
                count += len(ids)
    return total / count


@pytest.mark.slow
def test_gradients(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = run_cases(
        {"rejection": Case(rejection, hand_made_groups)}, make_models(tmp_path_factory.mktemp("models")), LAYOUTS
    )
    expected = reference_gradients(found.paths, likelihood_of_right_answers)
    for layout in LAYOUTS:
        assert_same_gradients(found.results[layout]["rejection"].gradients, expected)


def test_examples_are_the_right_responses() -> None:
    groups = hand_made_groups()
    examples = rejection().examples(groups, {}, {})
    right = [sample for group in groups for sample in group.samples if sample.reward == 1.0]
    assert len(examples) == len(right) > 3
    for example, sample in zip(examples, right, strict=True):
        assert np.array_equal(example.response_ids, sample.completion.token_ids) and not example.inert
        assert set(example.advantages_T.tolist()) == {1.0} and example.surrogate_count == sample.length


def test_the_objective_is_planned() -> None:
    """Right rollouts are trained on: all of solved groups, half of mixed ones."""
    config = page().RejectionConfig()
    config._reference = LoadedReference("rejection.py:Rejection", page().Rejection)
    steps = Steps(count=10, updates=1, samples=16, prompt=100, privileged=200, cliff_rate=0.25, solved_rate=0.125)
    assert work_of(config, steps) == {
        "student_scorings": (),
        "trained_share": 0.125 + 0.625 / 2,
        "distilled": False,
        "full": False,
        "top_k": 0,
    }
