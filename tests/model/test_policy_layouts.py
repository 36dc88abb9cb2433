"""The policy on every layout of one, two and four ranks, against `transformers` and autograd in float64.

Gradients are compared tensor by tensor: a loss can be right where its gradient is not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from distributed_helper import run_ranks
from full_logits import (
    Reference,
    assert_same_tensors,
    by_saved_name,
    first_step_of_adamw,
    load,
    norm,
    reference_score,
    reference_step,
)
from layout_cases import (
    CASES,
    EVERY_CASE,
    LAYOUTS,
    UNBOUNDED,
    Outcome,
    first_model,
    models_of,
    no_targets,
    overflowing,
    run_layout,
)
from tiny_policy import MODELS, OPTIMIZER, SPEC, make_checkpoint, make_examples, make_scorings

TOLERANCE = 2e-5  # of float32 sums in another order; wrong gradients are off by 1e-2 or more
Get = Callable[[str, str, str], Outcome]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {model: make_checkpoint(model, folder) for model in MODELS}


@pytest.fixture(scope="module")
def ranks_of(paths: dict[str, Path]) -> Callable[[str], list[dict[tuple[str, str, str], Outcome]]]:
    """The outcomes of every rank of a layout; each layout runs once."""

    @cache
    def run(layout: str) -> list[dict[tuple[str, str, str], Outcome]] | AssertionError:
        try:
            return run_ranks(LAYOUTS[layout][0], run_layout, layout, paths)
        except AssertionError as error:  # kept: what fails for one test fails for all
            return error

    def outcomes(layout: str) -> list[dict[tuple[str, str, str], Outcome]]:
        result = run(layout)
        if isinstance(result, AssertionError):
            raise result
        return result

    return outcomes


@pytest.fixture(scope="module")
def outcome(ranks_of) -> Get:
    return lambda layout, model, case: ranks_of(layout)[0][layout, model, case]


@pytest.fixture(scope="module")
def reference(paths: dict[str, Path]) -> Callable[[str], Reference]:
    return cache(lambda model: reference_step(paths[model], make_examples(), SPEC))


EVERY_MODEL = [pytest.param(layout, model, id=f"{layout}-{model}") for layout in LAYOUTS for model in models_of(layout)]


def assert_same_metrics(actual: dict[str, float], expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize(("layout", "model"), EVERY_MODEL)
def test_gradients_are_those_of_the_full_logits(layout: str, model: str, outcome: Get, reference) -> None:
    result, expected = outcome(layout, model, "gradients"), reference(model)
    assert_same_tensors(result.tensors, expected.gradients, TOLERANCE)
    assert_same_metrics(result.metrics, expected.metrics)
    live = sum(example.num_tokens for example in make_examples() if not example.inert)
    assert result.metrics["train/tokens"] == live


@pytest.mark.parametrize("layout", EVERY_CASE)
@pytest.mark.parametrize(
    "case",
    ["one_per_micro_batch", "all_in_one", "head_in_chunks", "recompute", "gradients_twice", "one_replica_has_all"],
)
def test_gradients_do_not_depend_on(case: str, layout: str, outcome: Get, reference) -> None:
    result, expected = outcome(layout, first_model(layout), case), reference(first_model(layout))
    assert_same_tensors(result.tensors, expected.gradients, TOLERANCE)
    assert_same_metrics(result.metrics, expected.metrics)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_behind_the_vocabulary_have_no_gradient(layout: str, ranks_of) -> None:
    for rank in ranks_of(layout):
        assert rank[layout, first_model(layout), "gradients"].more["padding"] == 0.0


@pytest.mark.parametrize(("layout", "model"), EVERY_MODEL)
def test_one_step_of_adamw(layout: str, model: str, outcome: Get, ranks_of, reference, paths) -> None:
    """The weights after one update, by AdamW's definition from the reference's gradients."""
    result, expected = outcome(layout, model, "update"), reference(model)
    total = norm(expected.gradients)
    assert total > OPTIMIZER.clip_grad  # else this would not see whether the norm is clipped
    assert result.metrics["train/grad_norm"] == pytest.approx(total, rel=1e-5)
    lr = OPTIMIZER.lr * OPTIMIZER.warmup_start
    assert (result.metrics["train/lr"], result.metrics["train/skipped"]) == (lr, 0.0)
    before = by_saved_name({name: p.detach().numpy() for name, p in load(paths[model]).named_parameters()})
    moved = {name: result.tensors[name] - before[name] for name in before}
    assert_same_tensors(moved, first_step_of_adamw(expected.gradients, before, OPTIMIZER), 1e-4)
    digests = {rank[layout, model, "update"].more["digest"] for rank in ranks_of(layout)}
    assert len(digests) == 1  # every rank, of every replica, holds the same model


@pytest.mark.parametrize("layout", EVERY_CASE)
def test_tokens_without_gradient_count(layout: str, outcome: Get, reference) -> None:
    """As many tokens again, of the same kinds, none with a gradient: both terms of the loss are halved."""
    result, expected = outcome(layout, first_model(layout), "one_replica_is_inert"), reference(first_model(layout))
    halved = {name: gradient / 2 for name, gradient in expected.gradients.items()}
    assert_same_tensors(result.tensors, halved, TOLERANCE)
    for name in ("train/surrogate_loss", "distill/loss"):
        assert result.metrics[name] == pytest.approx(expected.metrics[name] / 2, rel=1e-5)
    for name in ("distill/divergence", "distill/entropy", "train/entropy"):  # of the tokens that have a gradient
        assert result.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-5)


@pytest.mark.parametrize("layout", EVERY_CASE)
def test_a_step_without_a_distillation_token(layout: str, outcome: Get, paths) -> None:
    expected = reference_step(paths[first_model(layout)], no_targets(), SPEC)
    result = outcome(layout, first_model(layout), "no_distillation_token")
    assert_same_tensors(result.tensors, expected.gradients, TOLERANCE)
    assert_same_metrics(result.metrics, expected.metrics)
    assert result.metrics["distill/tokens"] == 0.0
    assert "distill/divergence" not in result.metrics


@pytest.mark.parametrize("layout", EVERY_CASE)
@pytest.mark.parametrize("case", ["everything_inert", "nothing_at_all"])
def test_a_step_without_work(case: str, layout: str, outcome: Get) -> None:
    result = outcome(layout, first_model(layout), case)
    assert norm(result.tensors) == 0.0
    assert result.metrics["train/tokens"] == 0.0
    assert result.metrics.get("train/surrogate_loss", 0.0) == 0.0


@pytest.mark.parametrize("layout", EVERY_CASE)
def test_an_overflow_where_the_weight_is_zero(layout: str, outcome: Get, paths) -> None:
    wild, tame = overflowing()
    gap = max(float(np.max(np.abs(a.old_logprobs_T - b.old_logprobs_T))) for a, b in zip(wild[:2], tame, strict=False))
    assert np.isinf(np.exp(np.float32(gap)))
    expected = reference_step(paths[first_model(layout)], tame, UNBOUNDED)
    result = outcome(layout, first_model(layout), "overflow_at_zero_weight")
    assert_same_tensors(result.tensors, expected.gradients, TOLERANCE)
    assert_same_metrics(result.metrics, expected.metrics)


@pytest.mark.parametrize("layout", EVERY_CASE)
def test_a_gradient_that_is_no_number_changes_nothing(layout: str, outcome: Get) -> None:
    """And the next step is, bit for bit, as if it had never been: moments, step count and schedule included."""
    result = outcome(layout, first_model(layout), "update_after_a_bad_gradient")
    assert result.more["bad"]["train/skipped"] == 1.0
    assert np.isnan(result.more["bad"]["train/grad_norm"])
    assert result.more["unchanged"]
    assert result.metrics["train/skipped"] == 0.0
    assert result.more["digest"] == outcome(layout, first_model(layout), "update").more["digest"]


@pytest.mark.parametrize(("layout", "model"), EVERY_MODEL)
def test_scores_are_those_of_transformers(layout: str, model: str, ranks_of, paths) -> None:
    theirs = load(paths[model])
    ranks = [rank[layout, model, "score"] for rank in ranks_of(layout)]
    for result in ranks:
        assert bool(result.more["scores"]) == result.more["last"]  # other stages know nothing
    for scoring in make_scorings():
        logprobs_T, entropy_T, all_TV = reference_score(theirs, scoring)
        found = [r.more["scores"][scoring.key] for r in ranks if scoring.key in r.more["scores"]]
        split = LAYOUTS[layout][1]
        # The tensor- and context-parallel ranks of one replica's last stage.
        assert len(found) == split.get("tensor", 1) * split.get("context", 1)
        for score in found:
            np.testing.assert_allclose(score.logprobs_T, logprobs_T, atol=2e-5)
            np.testing.assert_allclose(score.entropy_T, entropy_T, atol=2e-5)
            _check_top(score.top, all_TV, scoring.top_k)


def _check_top(top, all_TV: np.ndarray, k: int) -> None:
    if k == 0:
        assert top is None
        return
    assert top.ids_TK.shape == top.logprobs_TK.shape == (len(all_TV), k)
    assert all(len(set(ids)) == k for ids in top.ids_TK.tolist())
    np.testing.assert_allclose(top.logprobs_TK, -np.sort(-all_TV, axis=-1)[:, :k], atol=2e-5)
    np.testing.assert_allclose(top.logprobs_TK, np.take_along_axis(all_TV, top.ids_TK.astype(int), -1), atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_progress_counts_every_token(layout: str, ranks_of) -> None:
    """Each rank reports the rows that went through its own stage, padding included: a row per tensor-parallel rank and
    micro-batch, and under context parallelism two chunks' rest per sequence at most; and whole rounds of a pipeline."""
    split = LAYOUTS[layout][1]
    tensor, pipeline, context = (split.get(key, 1) for key in ("tensor", "pipeline", "context"))
    reported = [rank[layout, first_model(layout), "score"].more["rows"] for rank in ranks_of(layout)]
    total = sum(len(s.context_ids) + len(s.response_ids) for s in make_scorings())
    padding = 2 * context * tensor if context > 1 else tensor
    sequences = len(make_scorings()) + (pipeline if "virtual_stages" in split else 0)
    assert total <= sum(reported) / (tensor * pipeline * context) <= total + 2 * sequences * padding


def test_every_case_is_looked_at() -> None:
    """A case that no test reads is time for nothing."""
    source = Path(__file__).read_text()
    assert all(f'"{case}"' in source for case in CASES)
