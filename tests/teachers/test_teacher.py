"""The frozen teacher is frozen, the drifting one follows, and the policy comes back from scoring untouched."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed_helper import run_ranks
from layout_cases import share
from tiny_policy import OPTIMIZER, SPEC, VOCAB, build_policy, joined, make_checkpoint, make_examples, make_scorings

from megatron_hdpo.model.policy import Policy
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.hdpo import HDPO, HDPOConfig
from megatron_hdpo.sampling.step_rollouts import on_every_rank
from megatron_hdpo.teachers.teacher import PolicyTeacher, Teacher
from megatron_hdpo.teachers.weight_copies import FrozenTeacher
from megatron_hdpo.tracking.console import Console
from megatron_hdpo.training.learner import Learner
from megatron_hdpo.types.learning import Score
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, Group, Sample

LAYOUTS = {"tp2": (2, 1), "pp2": (1, 2), "dp2": (1, 1)}


def _bits(policy: Policy) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in policy.model.parameters()]


def _scores(policy: Policy) -> list[np.ndarray]:
    """Log-probs and top-k log-probs on the last stage; empty elsewhere."""
    scores: dict[Any, Score] = policy.score(make_scorings()[1:4])
    return [values for key in sorted(scores) for values in (scores[key].logprobs_T, scores[key].top.logprobs_TK)]


def _same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _score_with_teachers(path: Path, context) -> dict[str, bool]:
    policy = build_policy(path, context, optimizer=OPTIMIZER)
    undisturbed = build_policy(path, context, optimizer=OPTIMIZER)
    frozen, drifting = FrozenTeacher(policy), PolicyTeacher(policy)
    start, at_start = _bits(policy), _scores(policy)
    for each in (policy, undisturbed):
        each.update(share(each, make_examples()), SPEC)
    moved, after = _bits(policy), _scores(policy)
    found = {"last stage scores": bool(at_start) == context.is_last_stage, "update moved": moved != start}
    with frozen.scorer():
        found["frozen holds the first weights"] = _bits(policy) == start
        found["frozen scores as at the start"] = _same(_scores(policy), at_start)
    found["restored"] = _bits(policy) == moved
    resting = {name: values.data_ptr() for name, values in frozen._own.items()}
    with drifting.scorer():
        found["drifting is the policy"] = _bits(policy) == moved and _same(_scores(policy), after)
    found["policy scores otherwise"] = not at_start or not _same(after, at_start)
    with suppress(RuntimeError), frozen.scorer():
        raise RuntimeError("on purpose")
    found["restored after an error"] = _bits(policy) == moved
    for each in (policy, undisturbed):
        each.update(share(each, make_examples(seed=3)), SPEC)
    found["optimizer undisturbed"] = _bits(policy) == _bits(undisturbed) != moved
    with frozen.scorer():
        found["frozen after two updates"] = _same(_scores(policy), at_start)
    found["host memory is used again"] = resting == {n: v.data_ptr() for n, v in frozen._own.items()}
    return found


def _cliff() -> Group:
    """Its privileged prompt is its prompt: a teacher with the policy's weights agrees with it everywhere."""
    rng = np.random.default_rng(2)

    def sample(reward: float, length: int) -> Sample:
        ids = rng.integers(0, VOCAB, length).astype(np.int32)
        completion = Completion(ids, np.full(length, -5.0, dtype=np.float32), "stop", np.zeros(length, dtype=np.int32))
        return Sample(completion, "4", reward)

    prompt = rng.integers(0, VOCAB, 6).astype(np.int32)
    problem = Problem("sums/0", "sums", "2 + 2?", "4")
    return Group(problem, prompt, [sample(0.0, 4), sample(0.0, 3)], prompt, [sample(1.0, 5), sample(1.0, 7)])


def _divergences(path: Path, context) -> dict[str, float]:
    """Return the learner's metrics with either teacher, before and after an update of the policy."""
    config = HDPOConfig.model_validate({"name": "hdpo", "distill": {"coefficient": 1e-12, "top_k": VOCAB}})
    objective, found = HDPO(config, ObjectiveDeps()), {}
    policy = build_policy(path, context, optimizer=OPTIMIZER.model_copy(update={"weight_decay": 0.0}))
    teachers: dict[str, Teacher] = {
        "frozen": FrozenTeacher(policy),
        "policy": PolicyTeacher(policy),
    }
    for when in ("before", "after"):
        for name, teacher in teachers.items():
            learner = Learner(policy, objective, teacher, Console(enabled=False))
            metrics = learner.learn(on_every_rank([_cliff()]), 0)
            assert metrics["distill/tokens"] == 12.0
            found[f"{name} {when}"] = metrics["distill/divergence"]
        policy.update(share(policy, make_examples()), SPEC)
    return found


def _visit(path: Path) -> dict[str, tuple[dict[str, bool], dict[str, float]]]:
    seen = {}
    for name, (tensor, pipeline) in LAYOUTS.items():
        with joined(tensor, pipeline) as context:
            seen[name] = (_score_with_teachers(path, context), _divergences(path, context))
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, _visit, make_checkpoint("llama_tied", tmp_path_factory.mktemp("models")), timeout=240.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_and_scores(layout: str, ranks) -> None:
    for rank, seen in enumerate(ranks):
        found, _ = seen[layout]
        assert all(found.values()), f"rank {rank}: {[what for what, holds in found.items() if not holds]}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_learner_asks_the_teacher_of_the_recipe(layout: str, ranks) -> None:
    for seen in ranks:
        _, jsd = seen[layout]
        assert abs(jsd["frozen before"]) < 1e-6 and abs(jsd["policy before"]) < 1e-6
        assert abs(jsd["policy after"]) < 1e-6
        assert jsd["frozen after"] > 1e-3
