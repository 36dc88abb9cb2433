"""Communication beside computation changes nothing: neither gradients, nor the weights that anybody reads after an
update."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from distributed_helper import run_ranks
from layout_cases import share
from tiny_policy import (
    ONE_PER_MICRO_BATCH,
    OPTIMIZER,
    SPEC,
    build_policy,
    gradients_of,
    joined,
    make_checkpoint,
    make_examples,
    make_scorings,
    weights_of,
)

from megatron_hdpo.model import build
from megatron_hdpo.model.chunks import chunks_of
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.sampling.step_rollouts import on_every_rank
from megatron_hdpo.teachers.teacher import PolicyTeacher
from megatron_hdpo.teachers.weight_copies import FrozenTeacher, _Following
from megatron_hdpo.tracking.console import Console
from megatron_hdpo.training.learner import Learner

# name: world size, layout (replicas take what is left), models.
LAYOUTS: dict[str, tuple[int, dict[str, int], tuple[str, ...]]] = {
    "dp2": (2, {}, ("llama", "qwen3_tied")),
    "cp2": (2, {"context": 2}, ("llama",)),
    "ep2": (2, {"expert": 2}, ("qwen3_moe",)),
    "dp4": (4, {}, ("llama",)),
    "tp2_dp2": (4, {"tensor": 2}, ("llama",)),
    "pp2_dp2": (4, {"pipeline": 2}, ("llama", "qwen3_tied")),
    "vpp2_dp2": (4, {"pipeline": 2, "virtual_stages": 2}, ("llama",)),
}
# With Megatron's 40 million every tiny model would be one bucket, and nothing could be early or late.
SMALL_BUCKETS = partial(build.DistributedDataParallelConfig, bucket_size=3000)


def run_cases(names: list[str], paths: dict[str, Path]) -> dict[tuple[str, str, bool], dict[str, Any]]:
    found = {}
    with mock.patch.object(build, "DistributedDataParallelConfig", SMALL_BUCKETS):
        for name in names:
            for overlap in (False, True):
                with joined(**LAYOUTS[name][1], overlap=overlap) as context:
                    for model in LAYOUTS[name][2]:
                        policy = build_policy(paths[model], context, budget=ONE_PER_MICRO_BATCH, optimizer=OPTIMIZER)
                        found[name, model, overlap] = _steps(policy)
    return found


def _steps(policy: Policy) -> dict[str, Any]:
    """Do what a run does: score, update several times in a row, read the weights, score with them."""
    found: dict[str, Any] = {"buckets": [len(chunk.bucket_groups) for chunk in chunks_of(policy.ddp)]}
    found["scores before"] = _scores(policy)
    policy.accumulate_gradients(share(policy, make_examples()), SPEC)
    found["gradients"] = gradients_of(policy)
    policy.update(share(policy, make_examples()), SPEC)
    found["weights"] = weights_of(policy)
    found["scores"] = _scores(policy)
    policy.update([] if policy.context.dp_rank else make_examples(seed=3), SPEC, another_follows=True)
    found["last"] = policy.update(share(policy, make_examples(seed=4)), SPEC)
    found["weights after two more"] = weights_of(policy)
    return found


def _scores(policy: Policy) -> list[np.ndarray]:
    scores = policy.score(make_scorings()[1:4])
    return [scores[key].logprobs_T for key in sorted(scores)]


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("models")
    paths = {model: make_checkpoint(model, folder) for model in ("llama", "qwen3_tied", "qwen3_moe")}
    names = [name for name, (size, *_) in LAYOUTS.items() if size == request.param]
    return run_ranks(request.param, run_cases, names, paths, timeout=200.0)


def test_nothing_changes(outcomes: list[dict]) -> None:
    for rank in outcomes:
        for (name, model, overlap), found in rank.items():
            if not overlap:
                continue
            expected = rank[name, model, False]
            assert found["last"] == pytest.approx(expected["last"], rel=1e-5)
            for what in ("scores before", "gradients", "weights", "scores", "weights after two more"):
                _assert_same(found[what], expected[what], f"{name} {model} {what}")


def test_several_buckets_overlap(outcomes: list[dict]) -> None:
    """On the first pipeline rank: later ones are not what the others wait for, and Megatron gives them one."""
    for (_, _, overlap), found in outcomes[0].items():
        assert not overlap or max(found["buckets"]) > 2


def test_updates_move_the_weights(outcomes: list[dict]) -> None:
    for found in outcomes[0].values():
        assert any(np.abs(found["weights"][n] - v).max() > 1e-3 for n, v in found["weights after two more"].items())


def _assert_same(actual: Any, expected: Any, what: str) -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        actual, expected = [actual[name] for name in expected], list(expected.values())
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6, err_msg=what)


@pytest.mark.parametrize(("reads", "expected"), [(False, [True, True, False]), (True, [False] * 3)])
def test_a_learner_leaves_weights_to_the_next_update(reads: bool, expected: list[bool], monkeypatch: Any) -> None:
    """But not the last one's, and not where the teacher reads them after every update."""
    another_follows: list[bool] = []

    def update(part: Any, loss: Any, advance: Any, head: Any, another: bool) -> dict[str, float]:
        another_follows.append(another)
        return {"train/skipped": 0.0}

    nothing = lambda *_: None  # noqa: E731
    teacher: Any = SimpleNamespace(follows_updates=reads, after_update=nothing, after_step=nothing)
    objective: Any = SimpleNamespace(begin_step=nothing, loss=None)
    policy: Any = SimpleNamespace(update=update, architecture=None)
    learner = Learner(policy, objective, teacher, Console(enabled=False), updates_per_step=3)
    monkeypatch.setattr(learner, "_share", lambda groups: groups)
    monkeypatch.setattr(learner, "_plan", lambda groups: ([], None, {}))
    learner.work = SimpleNamespace(trained=nothing)  # type: ignore[assignment]
    learner.learn(on_every_rank([]), step=0)
    assert another_follows == expected


def test_who_reads_weights_after_every_update() -> None:
    clocks = {clock: _Following.__new__(_Following) for clock in ("optimizer_step", "rollout_step")}
    for clock, teacher in clocks.items():
        teacher.clock = clock
    assert [clocks[clock].follows_updates for clock in clocks] == [True, False]
    assert not PolicyTeacher.follows_updates and not FrozenTeacher.__new__(FrozenTeacher).follows_updates
