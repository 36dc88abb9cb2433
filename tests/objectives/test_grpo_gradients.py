"""GRPO's options: gradients by parameter against their definitions in float64, and what must not change them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from method_gradients import (
    Case,
    Found,
    Models,
    Paths,
    assert_same_gradients,
    hand_made_groups,
    make_models,
    reference_gradients,
    run_cases,
    sample_of,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig
from megatron_hdpo.types.rollouts import Group, Sample

TEMPERATURE = 0.8
CLIPS = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.6, "importance_cap": 1.5}
# The geometric mean of a response's ratios is within a few hundredths of 1 here.
SEQUENCE_CLIPS = {"ratio": "sequence", "clip_low": 0.01, "clip_high": 0.02}


def objective(updates: int = 1, **keys: object) -> GRPO:
    return GRPO(GRPOConfig.model_validate({"advantage": "rloo", **keys}), ObjectiveDeps(TEMPERATURE, updates))


def plain() -> GRPO:
    return objective()


def clipped() -> GRPO:
    return objective(2, surrogate=CLIPS)


def by_sequence() -> GRPO:
    return objective(aggregation="sequence", overlong="mask")


def sequence_ratio() -> GRPO:
    return objective(2, aggregation="sequence", surrogate=SEQUENCE_CLIPS)


def sequence_ratio_by_token() -> GRPO:
    return objective(2, surrogate={**SEQUENCE_CLIPS, "importance_cap": 1.5})


def penalised() -> GRPO:
    return objective(2, kl={"coefficient": 0.3}, overlong="mask")


def unpenalised() -> GRPO:
    return objective(2, overlong="mask")


def rloo(group: Group) -> list[float]:
    """Each reward less the mean of the others; 0 for a rollout alone."""
    rewards = [sample.reward for sample in group.samples]
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    return [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]


def sampled(logits: Tensor, ids: np.ndarray) -> Tensor:
    logprobs = torch.log_softmax(logits / TEMPERATURE, -1)
    return logprobs[torch.arange(len(ids)), torch.from_numpy(ids).long()]


def surrogate(own: Tensor, old: Tensor, sample: Sample, advantage: float, keys: dict) -> Tensor:
    """[T], one token at a time; `ratio: sequence` replaces every token's ratio by the geometric mean, of which, where
    tokens weigh differently, each token's gradient is its own."""
    ratio = (own - old).exp()
    if keys.get("ratio") == "sequence":
        ratio = (own - old).mean().exp().expand(len(own))
        if "importance_cap" in keys:
            ratio = ratio.detach() * (own - own.detach()).exp()
    losses = []
    for t, r in enumerate(ratio):
        low, high = 1 - keys.get("clip_low", 0.2), 1 + keys.get("clip_high", 0.2)
        loss = -torch.minimum(advantage * r, advantage * r.clamp(low, high))
        if advantage < 0 and "dual_clip" in keys:
            loss = loss.clamp(max=-advantage * keys["dual_clip"])
        if "importance_cap" in keys:
            loss = loss * min(keys["importance_cap"], math.exp(float(old[t]) - float(sample.completion.logprobs[t])))
        losses.append(loss)
    return torch.stack(losses)


def with_an_empty_response() -> list[Group]:
    """Its reward is part of the others' baseline; it has no token."""
    groups = hand_made_groups()
    rng = np.random.default_rng(0)
    groups[0].samples.append(sample_of(rng, 1.0, 0))
    groups[3].samples.insert(0, sample_of(rng, 0.0, 0))
    return groups


def loss_of(
    keys: dict,
    *,
    moved: bool = False,
    by_sequence: bool = False,
    mask: bool = False,
    kl: float = 0.0,
    groups: Callable[[], list[Group]] = hand_made_groups,
) -> Callable[[Models], Tensor]:
    def loss(models: Models) -> Tensor:
        total, count = torch.zeros(()).double(), 0
        for group in groups():
            for sample, advantage in zip(group.samples, rloo(group), strict=True):
                if not sample.length or (mask and sample.completion.finish_reason == "length"):
                    continue
                ids = sample.completion.token_ids
                own = sampled(models.student(group.prompt_ids, ids), ids)
                old = sampled(models.before(group.prompt_ids, ids), ids) if moved else own.detach()
                tokens = surrogate(own, old, sample, advantage, keys)
                if kl:
                    tokens = tokens + kl * 0.5 * (own - sampled(models.teacher(group.prompt_ids, ids), ids)) ** 2
                total = total + (tokens.mean() if by_sequence else tokens.sum())
                count += 1 if by_sequence else len(ids)
        return total / count

    return loss


G = hand_made_groups
CAPPED = {**SEQUENCE_CLIPS, "importance_cap": 1.5}
EXPECTED: dict[str, tuple[Case, Callable[[Models], Tensor]]] = {
    "plain": (Case(plain, G), loss_of({})),
    "clipped": (Case(clipped, G, moved=True), loss_of(CLIPS, moved=True)),
    "by_sequence": (Case(by_sequence, G), loss_of({}, by_sequence=True, mask=True)),
    "sequence_ratio": (
        Case(sequence_ratio, G, moved=True, head_chunk=7),
        loss_of(SEQUENCE_CLIPS, moved=True, by_sequence=True),
    ),
    "sequence_ratio_by_token": (Case(sequence_ratio_by_token, G, moved=True), loss_of(CAPPED, moved=True)),
    "empty_response": (
        Case(sequence_ratio, with_an_empty_response, moved=True),
        loss_of(SEQUENCE_CLIPS, moved=True, by_sequence=True, groups=with_an_empty_response),
    ),
    "penalised": (Case(penalised, G, moved=True), loss_of({}, moved=True, mask=True, kl=0.3)),
}
LAYOUTS = ["one_rank", "cp2", "tp2_dp2"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def found(paths: Paths) -> Found:
    cases = {name: case for name, (case, _) in EXPECTED.items()}
    return run_cases(cases | {"unpenalised": Case(unpenalised, G, moved=True)}, paths, LAYOUTS)


@pytest.fixture(scope="module")
def expected(found: Found) -> dict[str, dict[str, np.ndarray]]:
    return {n: reference_gradients(found.paths, loss, case.moved) for n, (case, loss) in EXPECTED.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EXPECTED)
def test_gradients(name: str, layout: str, found: Found, expected: dict[str, dict[str, np.ndarray]]) -> None:
    assert_same_gradients(found.results[layout][name].gradients, expected[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_options_are_seen(layout: str, found: Found) -> None:
    """Each case's gradient is another: a clip or a penalty that did nothing would show here."""
    results = found.results[layout]
    for name, less in (("clipped", "plain"), ("sequence_ratio", "by_sequence"), ("penalised", "unpenalised")):
        mine, other = (results[n].gradients["lm_head.weight"] for n in (name, less))
        assert np.abs(mine - other).max() > 0.01 * np.abs(mine).max(), name
    assert 0.02 < results["clipped"].metrics["train/clip_fraction"] < 0.9
    assert 0.1 < results["sequence_ratio"].metrics["train/clip_fraction"] < 0.9


@pytest.mark.parametrize("layout", LAYOUTS)
def test_metrics(layout: str, found: Found) -> None:
    """Over all replicas: the largest ratio of trainer, before the step's update, to engine, and the sampled KL of the
    present policy to the reference."""
    models, before, ratios, kls = Models(found.paths, moved=True), Models(found.paths, moved=False), [], []
    for group in hand_made_groups():
        inert = not any(rloo(group))
        for sample in group.samples:
            if sample.completion.finish_reason == "length":
                continue
            ids = sample.completion.token_ids
            own = sampled(models.student(group.prompt_ids, ids), ids).detach()
            kls += (own - sampled(models.teacher(group.prompt_ids, ids), ids)).tolist()
            old = sampled(before.student(group.prompt_ids, ids), ids).detach()
            ratios += [] if inert else (old.numpy() - sample.completion.logprobs).tolist()
    metrics = found.results[layout]["penalised"].metrics
    assert metrics["train/reference_kl"] == pytest.approx(np.mean(kls), rel=1e-4)
    unpenalised = found.results[layout]["unpenalised"].metrics
    assert unpenalised["train/mismatch_max"] == pytest.approx(math.exp(max(ratios)), rel=1e-3)
    assert "train/reference_kl" not in unpenalised


def permuted() -> list[Group]:
    groups = [replace(group, samples=group.samples[::-1]) for group in hand_made_groups()]
    return groups[3:] + groups[:3]


def without_signal() -> list[Group]:
    return [group for group in hand_made_groups() if not any(rloo(group))]


SAME = {
    "permuted": Case(sequence_ratio, permuted, moved=True),
    "one per micro-batch": Case(sequence_ratio, G, moved=True, budget=20),
    "all in one": Case(sequence_ratio, G, moved=True, budget=1000),
}
DEGENERATE = {
    "no signal": Case(clipped, without_signal, moved=True),
    "no group": Case(sequence_ratio, list),
    "no signal, penalised": Case(penalised, without_signal, moved=True),
}


def test_what_must_not_matter(paths: Paths, found: Found) -> None:
    results = run_cases(SAME | DEGENERATE, paths, ["tp2_dp2"]).results["tp2_dp2"]
    for name in SAME:
        assert_same_gradients(results[name].gradients, found.results["one_rank"]["sequence_ratio"].gradients, 1e-4)
    for name in ("no signal", "no group"):
        assert all(not values.any() for values in results[name].gradients.values()), name
    assert all(np.isfinite(values).all() for values in results["no signal, penalised"].gradients.values())
    assert results["no signal, penalised"].gradients["lm_head.weight"].any()


def test_a_constant_on_all_logits(paths: Paths, found: Found, tmp_path: Path) -> None:
    """One vector added to every row of the head adds one number to all logits of a token: the body's gradient stays."""
    model = AutoModelForCausalLM.from_pretrained(paths["student"], dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.linspace(-0.5, 0.5, model.config.hidden_size))
    model.save_pretrained(tmp_path / "shifted")
    shifted = run_cases({"plain": Case(plain, G)}, {**paths, "student": tmp_path / "shifted"}, ["tp2"])
    ours, theirs = shifted.results["tp2"]["plain"].gradients, found.results["one_rank"]["plain"].gradients
    body = [name for name in theirs if name not in ("lm_head.weight",)]
    assert_same_gradients({n: ours[n] for n in body}, {n: theirs[n] for n in body})


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_why_the_penalty_is_k2(estimator: str) -> None:
    """Expected gradients over the policy's own samples, by enumeration: k2's is that of KL(q || p), k1's is zero, k3's
    is that of KL(p || q)."""
    torch.manual_seed(0)
    z, p = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64).softmax(-1)
    lq = z.log_softmax(-1)
    log_ratio = lq - p.log()
    value = {"k1": log_ratio, "k2": 0.5 * log_ratio**2, "k3": (-log_ratio).exp() - 1 + log_ratio}[estimator]
    (gradient,) = torch.autograd.grad((lq.exp().detach() * value).sum(), z, retain_graph=True)
    reverse, forward = (lq.exp() * log_ratio).sum(), (p * -log_ratio).sum()
    expected = {"k1": 0 * reverse, "k2": reverse, "k3": forward}[estimator]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0], atol=1e-12, rtol=0)
