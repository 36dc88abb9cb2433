"""The start-up self-test: each of its failures is provoked, stops the run, and is named with its amount."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import results_of, run_world
from pydantic import ValidationError
from recipes import Tree

from megatron_hdpo.config import parse_recipe
from megatron_hdpo.health.config import SelfTestConfig
from megatron_hdpo.health.selftest import logprob_limit
from megatron_hdpo.training.start import fp8_key
from megatron_hdpo.types.rollouts import GenerationResult


class Faulty:
    """The engine of a run with one fault."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.updates = engine, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def update_weights(self, stream: Any, version: int) -> None:
        self.updates += 1
        self.engine.update_weights(stream, version)

    def results(self) -> Iterator[GenerationResult]:
        for result in self.engine.results():
            yield replace(result, completions=[self.change(completion) for completion in result.completions])

    def change(self, completion: Any) -> Any:
        return completion


class ShiftedLogprobs(Faulty):
    def change(self, completion: Any) -> Any:
        return replace(completion, logprobs=np.roll(completion.logprobs, 1))


class StaleWeights(Faulty):
    """Keeps the weights that it has, and says that they are the new ones."""

    def update_weights(self, stream: Any, version: int) -> None:
        self.engine._version = version


class LateWeights(Faulty):
    """Takes the altered weights, then misses the update that brings the true ones back."""

    def update_weights(self, stream: Any, version: int) -> None:
        self.updates += 1
        if self.updates == 1:
            self.engine.update_weights(stream, version)


class OldVersion(Faulty):
    def change(self, completion: Any) -> Any:
        return replace(completion, weight_versions=completion.weight_versions - 1)


class NoSamples(Faulty):
    def results(self) -> Iterator[GenerationResult]:
        for result in self.engine.results():
            yield GenerationResult(result.request_id, [], ["out of memory"] * len(result.completions))


FAULTS: dict[str, type[Faulty]] = {
    "healthy": Faulty,
    "shifted log-probs": ShiftedLogprobs,
    "stale weights": StaleWeights,
    "late weights": LateWeights,
    "old version": OldVersion,
    "no samples": NoSamples,
    "rolled targets": Faulty,
    "noisy log-probs": Faulty,
}


def all_faults(recipe: str, overrides: Sequence[str]) -> dict[str, str]:
    """Message of the self-test with each fault, on one run whose engine is made whole again in between."""
    from megatron_hdpo.config import load_recipe
    from megatron_hdpo.health.selftest import SelfTestError
    from megatron_hdpo.parallel import context as parallel
    from megatron_hdpo.rollout.weight_sync import EmbeddedSync
    from megatron_hdpo.training import start
    from megatron_hdpo.training.run import build_run

    settings = load_recipe(recipe, overrides)
    run = build_run(settings, parallel.start(settings.parallel, settings.device, settings.seed))
    engine, messages = run.engine, {}
    for name, fault in FAULTS.items():
        run.sync(0)
        run.engine = run.coordinator.sampler.engine = fault(engine)
        run.sync.weight_sync = EmbeddedSync(run.engine)
        with faulty_policy(run.policy, name):
            try:
                start._self_test(run)
                messages[name] = "passed"
            except SelfTestError as error:
                messages[name] = str(error)
        run.engine, run.sync.weight_sync = engine, EmbeddedSync(engine)
    before = {name: p.detach().clone() for name, p in run.policy.model.named_parameters()}
    start._self_test(run)
    assert all((p == before[name]).all() for name, p in run.policy.model.named_parameters())
    run.close(False)
    return messages


class faulty_policy:
    """For "rolled targets": the teacher's rows belong to the token before. For "noisy": scores off by 0.01."""

    def __init__(self, policy: Any, name: str) -> None:
        self.policy, self.name, self.score = policy, name, policy.score

    def __enter__(self) -> None:
        change = {"rolled targets": self._rolled, "noisy log-probs": self._noisy}.get(self.name)
        if change is not None:
            self.policy.score = lambda scorings, on_progress=None: {
                key: change(score) for key, score in self.score(scorings, on_progress).items()
            }

    def __exit__(self, *_: object) -> None:
        self.policy.score = self.score

    @staticmethod
    def _rolled(score: Any) -> Any:
        if score.top is None:
            return score
        rolled = (np.roll(score.top.ids_TK, 1, axis=0), np.roll(score.top.logprobs_TK, 1, axis=0))
        return replace(score, top=type(score.top)(*rolled))

    @staticmethod
    def _noisy(score: Any) -> Any:
        return replace(score, logprobs_T=score.logprobs_T + np.float32(0.01))


CHECKS = {
    "shifted log-probs": r"self-test \(a\): engine and trainer disagree on the log-probs of \d+ sampled tokens by "
    r"(\S+) on average \(at most 0.001 is allowed: engine and trainer compute in float32\)",
    "noisy log-probs": r"self-test \(a\): engine and trainer disagree .* by (\S+) on average \(at most 0.001 is",
    "rolled targets": r"self-test \(b\): a teacher with the student's own prompt has divergence (\S+) per token, at "
    "most 1e-05 is allowed",
    "stale weights": r"self-test \(c\): the engine was given altered weights and its log-probs still agree with the "
    r"trainer's \(difference (\S+)\): weight updates do not arrive",
    "late weights": r"self-test \(c\): the engine was given the true weights again and its log-probs differ by (\S+) "
    r"\(at most 0.001 is allowed: ",
    "old version": r"self-test \(c\): the engine served weights of version \[-1\], not 0",
    "no samples": "self-test: none of 4 rollouts could be used: generation failed: out of memory",
}
AMOUNTS: dict[str, Callable[[float], bool]] = {
    "shifted log-probs": lambda amount: amount > 1e-2,
    "noisy log-probs": lambda amount: abs(amount - 0.01) < 1e-4,
    "rolled targets": lambda amount: amount > 1e-3,
    "stale weights": lambda amount: amount < 1e-4,
    "late weights": lambda amount: amount > 1e-2,
}


@pytest.mark.parametrize("layout", [{}, {"pipeline": 2}], ids=["1 rank", "PP2"])
@pytest.mark.fault(
    "engine and trainer disagree from the start: shifted log-probs, other weights, weights that do not arrive",
    phase="self-test",
    seen="`self-test (...)` with what was compared; exit code 2",
    lost="nothing",
)
def test_every_fault_is_found_and_named(
    layout: dict[str, int], tree: Tree, write_recipe: Callable[[Tree], Path]
) -> None:
    ranks = layout.get("pipeline", 1)
    path = write_recipe(tree | {"parallel": layout})
    per_rank = results_of(
        run_world(ranks, all_faults, str(path), ["self_test.prompts=4", "self_test.max_new_tokens=8"])
    )
    assert per_rank == [per_rank[0]] * ranks  # every rank stops, for the same reason
    messages = per_rank[0]
    assert messages.pop("healthy") == "passed"
    assert messages.keys() == CHECKS.keys()
    for name, message in messages.items():
        found = re.match(CHECKS[name], message)
        assert found, f"{name}: {message}"
        if name in AMOUNTS:
            assert AMOUNTS[name](float(found[1])), f"{name}: {message}"


def test_with_fp8_faults_are_found_beyond_its_differences(tree: Tree, write_recipe: Callable[[Tree], Path]) -> None:
    """The limit is wider than what altered weights change in so small a model: check (c) compares with what was
    measured. The noise of 0.01 is below what FP8 itself changes."""
    overrides = ["self_test.prompts=4", "self_test.max_new_tokens=8", "model.spec=torch"]
    overrides.append("model.fp8_emulation=tensorwise")
    (messages,) = results_of(run_world(1, all_faults, str(write_recipe(tree)), overrides))
    assert messages["healthy"] == messages["noisy log-probs"] == "passed"
    for name in ("rolled targets", "stale weights", "old version", "no samples"):
        assert re.match(CHECKS[name], messages[name]), f"{name}: {messages[name]}"


def test_limits_and_their_reasons() -> None:
    config = SelfTestConfig()
    assert logprob_limit(config, True, None).nats == 1e-3
    assert "float32" in str(logprob_limit(config, True, None))
    assert logprob_limit(config, False, None).nats == 0.05
    for exact in (True, False):
        limit = logprob_limit(config, exact, "model.fp8=hybrid")
        assert str(limit) == "at most 0.5 is allowed: model.fp8=hybrid rounds the products of one side to FP8"
    own = logprob_limit(SelfTestConfig(mean_logprob_difference=0.3), False, "model.fp8=hybrid")
    assert str(own) == "at most 0.3 is allowed: self_test.mean_logprob_difference" and own.fp8
    with pytest.raises(ValidationError):
        SelfTestConfig(mean_logprob_difference=0.0)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({}, None),
        ({"model": {"fp8": "hybrid"}}, "model.fp8=hybrid"),
        ({"model": {"spec": "torch", "fp8_emulation": "mxfp8"}}, "model.fp8_emulation=mxfp8"),
        ({"rollout": {"engine": "sglang", "sglang": {"servers": {"quantization": "fp8"}}}}, "rollout.sglang.servers."),
    ],
    ids=["none", "fp8", "emulated", "servers"],
)
def test_the_setting_that_rounds_to_fp8_is_named(section: Tree, key: str | None, tree: Tree) -> None:
    for name, values in section.items():
        tree[name] = {k: v for k, v in tree[name].items() if k != "embedded"} | values
    found = fp8_key(parse_recipe(tree))
    assert found is None if key is None else str(found).startswith(key)


def train_with_a_fault(recipe: str) -> None:
    from megatron_hdpo import cli
    from megatron_hdpo.training import run

    original = run.build_run

    def build(*args: Any, **kwargs: Any) -> Any:
        built = original(*args, **kwargs)
        built.engine = built.coordinator.sampler.engine = ShiftedLogprobs(built.engine)  # type: ignore[assignment]
        return built

    run.build_run = build
    cli.main(["train", recipe])


def test_a_failure_stops_the_run_before_its_first_step(tree: Tree, write_recipe: Callable[[Tree], Path]) -> None:
    ended = run_world(2, train_with_a_fault, str(write_recipe(tree)))
    heard = "".join(ended.stderr)
    assert heard.startswith("SelfTestError: self-test (a): ") and heard.count("\n") == 1
    assert ended.codes == [2, 2]
    assert (Path(tree["output"]) / "metrics.jsonl").read_text() == ""
    assert not (Path(tree["output"]) / "checkpoints").exists()
