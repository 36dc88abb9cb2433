"""Gradients of every parameter for each method of privileged context, on one rank and on TP 2 x DP 2.

Metrics per token of some of them too.

The references are the methods' definitions on the logits of `transformers` in float64, one sequence and one token at a
time, with autograd; nothing of the package is in them but the record types. Contexts are known without asking the
objective: where a method draws a sibling, these groups leave it no choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hint_prompts import StubPrompts
from method_gradients import (
    Case,
    Models,
    assert_same_gradients,
    group_of,
    make_models,
    reference_gradients,
    run_cases,
    sample_of,
)
from torch import Tensor

from megatron_hdpo.data.prompts import Hint
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.contrastive_opsd import ContrastiveOPSD, ContrastiveOPSDConfig
from megatron_hdpo.objectives.opsd import OPSD, OPSDConfig
from megatron_hdpo.objectives.paced import PACED, PACEDConfig
from megatron_hdpo.objectives.rlcsd import RLCSD, RLCSDConfig
from megatron_hdpo.objectives.rlsd import RLSD, RLSDConfig
from megatron_hdpo.objectives.sdpo import SDPO, SDPOConfig
from megatron_hdpo.objectives.srpo import SRPO, SRPOConfig
from megatron_hdpo.types.learning import Objective
from megatron_hdpo.types.rollouts import Group, Sample

LENGTHS = (4, 1, 7, 3)
REWARDS = ([1, 0, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0], [1], [])
K = 5
FKL = {"kind": "forward_kl", "tail": "bucket", "top_k": K, "coefficient": 1.0}
STUDENT_JSD = {"coefficient": 1.0, "tail": "bucket", "support": "student", "top_k": K, "importance_cap": 1.5}
PROMPTS = StubPrompts()
Loss = Callable[[Models], Tensor]


def groups() -> list[Group]:
    """One right, one wrong, all right, all wrong, one right, a single one, none; a cut response in the second."""
    rng = np.random.default_rng(11)
    made = []
    for number, row in enumerate(REWARDS):
        samples = [
            sample_of(rng, float(r), LENGTHS[i], cut=(number, i) == (1, 2), text=f"thus {number}.{i} \\boxed{{{i}}}")
            for i, r in enumerate(row)
        ]
        for i, sample in enumerate(samples):
            sample.feedback = f"no, {number}.{i}" if number == 3 and i < 2 else None
        made.append(group_of(rng, samples, number, prompt=3 + number))
    return made


def groups_with_teachers_rollouts() -> list[Group]:
    rng = np.random.default_rng(12)
    made = groups()
    for number in (0, 1, 4):
        made[number].privileged_prompt_ids = PROMPTS.privileged_prompt(made[number].problem)
        made[number].privileged_samples = [sample_of(rng, 1.0, 3 + number), sample_of(rng, 0.0, 2)]
    return made


# What the references are made of.


def logp(logits_V: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.log_softmax(logits_V / temperature, -1)


def buckets(logprobs_V: Tensor, support: Tensor) -> Tensor:
    """Probabilities of the support's tokens and of all others together."""
    p = logprobs_V.exp()
    rest = torch.ones_like(p, dtype=torch.bool)
    rest[support] = False
    return torch.cat([p[support], p[rest].sum()[None]])


def clipped_forward_kl(p: Tensor, q: Tensor, clip: float = math.inf) -> Tensor:
    return torch.clamp(p * (p / q).log(), max=clip).sum()


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()


def surrogate(own: Tensor, old: float, advantage: float, low: float, high: float, dual: float = math.inf) -> Tensor:
    ratio = (own - old).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
    return torch.minimum(loss, torch.tensor(-advantage * dual)) if advantage < 0 else loss


def samples_of(made: list[Group]) -> Iterator[tuple[Group, int, Sample, np.ndarray]]:
    for group in made:
        for i, sample in enumerate(group.samples):
            yield group, i, sample, sample.completion.token_ids


def siblings(group: Group, index: int, reward: float) -> list[Sample]:
    return [sample for i, sample in enumerate(group.samples) if i != index and sample.reward == reward]


def hint(sample: Sample) -> Hint:
    return Hint(sample.text, sample.text[-2])  # the character in the box


def group_advantages(group: Group, ddof_std: bool = True) -> list[float]:
    """(R - mean) / (std with one degree of freedom less + 1e-6); or leave-one-out without a std."""
    rewards = [sample.reward for sample in group.samples]
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    if not ddof_std:
        return [(r - mean) * len(rewards) / (len(rewards) - 1) for r in rewards]
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (std + 1e-6) for r in rewards]


# The methods: the objective, and its loss by definition.


def opsd() -> Objective:
    return OPSD(
        OPSDConfig.model_validate({"distill": {**FKL, "coefficient": 0.7, "clip": 0.05}}),
        ObjectiveDeps(1.0, prompts=PROMPTS),
    )


def opsd_loss(models: Models) -> Tensor:
    total, count = torch.zeros(()), 0
    for group, _, _, ids in samples_of(groups()):
        taught = models.teacher(PROMPTS.privileged_prompt(group.problem), ids)
        for p_V, q_V in zip(taught, models.student(group.prompt_ids, ids), strict=True):
            support = p_V.topk(K).indices
            total = total + clipped_forward_kl(buckets(logp(p_V), support), buckets(logp(q_V), support), 0.05)
            count += 1
    return 0.7 * total / count


def opsd_full() -> Objective:
    settings = {"overlong": "mask", "distill": {"beta": 0.3, "support": "full", "temperature": 1.1, "coefficient": 1.0}}
    return OPSD(OPSDConfig.model_validate(settings), ObjectiveDeps(1.0, prompts=PROMPTS))


def opsd_full_loss(models: Models) -> Tensor:
    total, count = torch.zeros(()), 0
    for group, _, sample, ids in samples_of(groups()):
        if sample.completion.finish_reason == "length":
            continue
        taught = models.teacher(PROMPTS.privileged_prompt(group.problem), ids)
        for p_V, q_V in zip(taught, models.student(group.prompt_ids, ids), strict=True):
            total = total + jsd(logp(p_V, 1.1).exp(), logp(q_V, 1.1).exp(), 0.3)
            count += 1
    return total / count


def sdpo(updates: int = 1) -> Objective:
    return SDPO(SDPOConfig.model_validate({"distill": STUDENT_JSD}), ObjectiveDeps(0.9, updates, prompts=PROMPTS))


def sdpo_moved() -> Objective:
    return sdpo(2)


def demonstration(group: Group, i: int) -> Hint | None:
    right = siblings(group, i, 1.0)
    feedback = group.samples[i].feedback or ""
    return Hint(right[0].text if right else "", "", feedback) if right or feedback else None


def demonstrated_jsd(models: Models, group: Group, sample: Sample, shown: Hint, moved: bool) -> Iterator[Tensor]:
    """Each token's w JSD; w = min(1.5, q / q when sampled), at temperature 0.9."""
    ids = sample.completion.token_ids
    logits = models.student(group.prompt_ids, ids)
    before, taught = models.before(group.prompt_ids, ids), models.teacher(PROMPTS.hinted(group.problem, shown), ids)
    for t, y in enumerate(ids.tolist()):
        support = before[t].topk(K).indices
        old = logp(before[t], 0.9)[y] if moved else torch.tensor(float(sample.completion.logprobs[t]))
        weight = min(1.5, float((logp(logits[t], 0.9)[y].detach() - old).exp()))
        yield weight * jsd(buckets(logp(taught[t]), support), buckets(logp(logits[t]), support), 0.5)


def sdpo_loss(models: Models, moved: bool = False) -> Tensor:
    total, count = torch.zeros(()), 0
    for group, i, sample, _ in samples_of(groups()):
        shown = demonstration(group, i)
        for value in demonstrated_jsd(models, group, sample, shown, moved) if shown else ():
            total, count = total + value, count + 1
    return total / count


def sdpo_moved_loss(models: Models) -> Tensor:
    return sdpo_loss(models, moved=True)


def srpo(updates: int = 1) -> Objective:
    settings = {"distill": STUDENT_JSD | {"coefficient": 1.0}, "entropy_scale": 0.8}
    settings |= {"demonstration": {"sources": ["sibling", "feedback"]}}
    return SRPO(SRPOConfig.model_validate(settings), ObjectiveDeps(0.9, updates, prompts=PROMPTS))


def srpo_moved() -> Objective:
    return srpo(2)


def srpo_loss(models: Models, moved: bool = False) -> Tensor:
    plain, distilled, weights, count = torch.zeros(()), [], [], 0
    for group, i, sample, ids in samples_of(groups()):
        shown = demonstration(group, i)
        count += len(ids)
        if sample.reward == 0.0 and shown:
            distilled += demonstrated_jsd(models, group, sample, shown, moved)
            for p_V in models.teacher(PROMPTS.hinted(group.problem, shown), ids):
                entropy = -(logp(p_V).exp() * logp(p_V)).sum()
                weights.append(math.exp(-0.8 * float(entropy)))
            continue
        logits, before = models.student(group.prompt_ids, ids), models.before(group.prompt_ids, ids)
        for t, y in enumerate(ids.tolist()):
            own = logp(logits[t], 0.9)[y]
            old = float(logp(before[t], 0.9)[y]) if moved else float(own.detach())
            plain = plain + surrogate(own, old, group_advantages(group, ddof_std=False)[i], 0.2, 0.28)
    mean = sum(weights) / len(weights)
    return (plain + sum(w / mean * d for w, d in zip(weights, distilled, strict=True))) / count


def srpo_moved_loss(models: Models) -> Tensor:
    return srpo_loss(models, moved=True)


def rlsd() -> Objective:
    return RLSD(RLSDConfig(mix=0.8, mix_steps=4, modulation_clip=0.4), ObjectiveDeps(0.9, prompts=PROMPTS))


def rlsd_loss(models: Models) -> Tensor:
    """At step 1 of 4: lambda is 0.6."""
    total, count = torch.zeros(()), 0
    for group, i, _, ids in samples_of(groups()):
        advantage = group_advantages(group)[i]
        logits, taught = (
            models.student(group.prompt_ids, ids),
            models.teacher(PROMPTS.privileged_prompt(group.problem), ids),
        )
        for t, y in enumerate(ids.tolist()):
            own = logp(logits[t], 0.9)[y]
            w = math.exp(math.copysign(1.0, advantage) * float(logp(taught[t], 0.9)[y] - own.detach()))
            moved = advantage * (0.4 + 0.6 * min(max(w, 0.6), 1.4))
            total, count = total + surrogate(own, float(own.detach()), moved, 0.2, 0.2), count + 1
    return total / count


def rlsd_contrast() -> Objective:
    config = RLSDConfig(evidence="contrast", mix=0.5, mix_steps=None, modulation_clip=0.3, aggregation="sequence")
    return RLSD(config, ObjectiveDeps(0.9, 2, prompts=PROMPTS))


def pairs_groups() -> list[Group]:
    """Groups of at most three: one pair of siblings at most, whichever the sample."""
    return [group for group in groups() if len(group.samples) <= 3]


def pair(group: Group, i: int) -> tuple[Sample, Sample] | None:
    right, wrong = siblings(group, i, 1.0), siblings(group, i, 0.0)
    return (right[0], wrong[0]) if right and wrong else None


def rlsd_contrast_loss(models: Models) -> Tensor:
    total, count = torch.zeros(()), 0
    for group, i, _, ids in samples_of(pairs_groups()):
        advantage, shown = group_advantages(group)[i], pair(group, i)
        logits, before = models.student(group.prompt_ids, ids), models.before(group.prompt_ids, ids)
        taught = [models.teacher(PROMPTS.hinted(group.problem, hint(s)), ids) for s in shown or ()]
        for t, y in enumerate(ids.tolist()):
            factor = 1.0
            if taught:
                evidence = float(logp(taught[0][t], 0.9)[y] - logp(taught[1][t], 0.9)[y])
                w = math.exp(math.copysign(1.0, advantage) * evidence)
                factor = 0.5 + 0.5 * min(max(w, 0.7), 1.3)
            loss = surrogate(logp(logits[t], 0.9)[y], float(logp(before[t], 0.9)[y]), advantage * factor, 0.2, 0.2)
            total = total + loss / len(ids)
        count += 1
    return total / count


def rlcsd(aggregation: str = "rollout", updates: int = 1) -> Objective:
    settings = {"evidence_scale": 0.4, "bonus": 0.9, "threshold": 0.3, "moved_weight": 0.7, "aggregation": aggregation}
    return RLCSD(RLCSDConfig.model_validate(settings), ObjectiveDeps(0.9, updates, prompts=PROMPTS))


def rlcsd_pooled() -> Objective:
    return rlcsd("pooled", 2)


def rlcsd_paths(models: Models, moved: bool) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Losses of the two paths of each rollout with both hints."""
    for group, i, _, ids in samples_of(groups()):
        right, wrong = siblings(group, i, 1.0), siblings(group, i, 0.0)
        if not right or not wrong:
            continue
        assert len(right) == 1 and len(wrong) <= 4  # no choice is left
        advantage, paths = group_advantages(group)[i], ([], [])
        logits, before = models.student(group.prompt_ids, ids), models.before(group.prompt_ids, ids)
        after_right = models.teacher(PROMPTS.hinted(group.problem, hint(right[0])), ids)
        after_wrong = [models.teacher(PROMPTS.hinted(group.problem, hint(s)), ids) for s in wrong]
        for t, y in enumerate(ids.tolist()):
            mean = sum(float(logp(z[t], 0.9)[y].exp()) for z in after_wrong) / len(wrong)
            r = 0.9 * math.tanh((float(logp(after_right[t], 0.9)[y]) - math.log(mean)) / 0.4)
            new = max(advantage + r, 0.0) if advantage > 0 else min(advantage + r, 0.0)
            chosen = abs(r) > 0.3
            own = logp(logits[t], 0.9)[y]
            old = float(logp(before[t], 0.9)[y]) if moved else float(own.detach())
            paths[chosen].append(surrogate(own, old, new if chosen else advantage, 0.2, 0.2, dual=3.0))
        yield paths


def rlcsd_loss(models: Models) -> Tensor:
    means = []
    for plain, chosen in rlcsd_paths(models, moved=False):
        first = sum(plain) / len(plain) if plain else 0.0
        means.append(first + (0.7 * sum(chosen) / len(chosen) if chosen else 0.0))
    return sum(means) / len(means)


def rlcsd_pooled_loss(models: Models) -> Tensor:
    paths = list(rlcsd_paths(models, moved=True))
    plain, chosen = ([loss for both in paths for loss in both[side]] for side in (0, 1))
    assert plain and chosen
    return sum(plain) / len(plain) + 0.7 * sum(chosen) / len(chosen)


def contrastive() -> Objective:
    settings = {"guidance": 0.6, "half_weight": 0.3, "floor": -4.5, "distill": {**FKL, "clip": 0.05}}
    return ContrastiveOPSD(ContrastiveOPSDConfig.model_validate(settings), ObjectiveDeps(1.0, prompts=PROMPTS))


def contrastive_loss(models: Models) -> Tensor:
    total, count = torch.zeros(()), 0
    for group, i, _, ids in samples_of(pairs_groups()):
        shown = pair(group, i)
        if shown is None:
            continue
        right, wrong = (models.teacher(PROMPTS.hinted(group.problem, hint(s)), ids) for s in shown)
        for t, q_V in enumerate(models.student(group.prompt_ids, ids)):
            support = right[t].topk(K).indices
            p_c, p_w = (buckets(logp(z[t]), support) for z in (right, wrong))
            kl = float((p_c * (p_c / p_w).log()).sum())
            guided = torch.softmax(1.6 * p_c.log() - 0.6 * p_w.log().clamp(min=-4.5), -1)
            total = total + kl / (kl + 0.3) * clipped_forward_kl(guided, buckets(logp(q_V), support), 0.05)
            count += 1
    return total / count


def paced() -> Objective:
    settings = {"switch_step": 2, "pass_exponent": 2.0, "distill": {**FKL, "coefficient": 0.5}}
    return PACED(PACEDConfig.model_validate(settings), ObjectiveDeps(1.0, prompts=PROMPTS))


def pace(group: Group) -> float:
    rate = sum(s.reward for s in group.samples) / len(group.samples) if group.samples else 0.0
    return rate**2 * (1 - rate)


def paced_first_loss(models: Models) -> Tensor:
    total, weights = torch.zeros(()), 0.0
    for group in groups_with_teachers_rollouts():
        for sample in (s for s in group.privileged_samples if s.reward == 1.0):
            ids = sample.completion.token_ids
            taught = models.teacher(PROMPTS.privileged_prompt(group.problem), ids)
            for p_V, q_V in zip(taught, models.student(group.prompt_ids, ids), strict=True):
                support = p_V.topk(K).indices
                p, q = buckets(logp(p_V), support), buckets(logp(q_V), support)
                total, weights = total + pace(group) * clipped_forward_kl(p, q), weights + pace(group)
    return 0.5 * total / weights


def paced_second_loss(models: Models) -> Tensor:
    total, weights = torch.zeros(()), 0.0
    for group, _, _, ids in samples_of(groups()):
        taught = models.teacher(PROMPTS.privileged_prompt(group.problem), ids)
        for p_V, q_V in zip(taught, models.student(group.prompt_ids, ids), strict=True):
            support = p_V.topk(K).indices
            p, q = buckets(logp(p_V), support), buckets(logp(q_V), support)
            total, weights = total + pace(group) * clipped_forward_kl(q, p), weights + pace(group)
    return 0.5 * total / weights


METHODS: dict[str, tuple[Case, Loss]] = {
    "opsd": (Case(opsd, groups), opsd_loss),
    "opsd_full": (Case(opsd_full, groups, budget=25), opsd_full_loss),
    "sdpo": (Case(sdpo, groups, head_chunk=4), sdpo_loss),
    "sdpo_moved": (Case(sdpo_moved, groups, moved=True), sdpo_moved_loss),
    "srpo": (Case(srpo, groups), srpo_loss),
    "srpo_moved": (Case(srpo_moved, groups, moved=True), srpo_moved_loss),
    "rlsd": (Case(rlsd, groups, step=1), rlsd_loss),
    "rlsd_contrast": (Case(rlsd_contrast, pairs_groups, moved=True), rlsd_contrast_loss),
    "rlcsd": (Case(rlcsd, groups, budget=25), rlcsd_loss),
    "rlcsd_pooled": (Case(rlcsd_pooled, groups, moved=True), rlcsd_pooled_loss),
    "contrastive": (Case(contrastive, pairs_groups), contrastive_loss),
    "paced_first": (Case(paced, groups_with_teachers_rollouts, step=1), paced_first_loss),
    "paced_second": (Case(paced, groups_with_teachers_rollouts, step=2), paced_second_loss),
}
LAYOUTS = ("one_rank", "cp2", "tp2_dp2")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    paths = make_models(tmp_path_factory.mktemp("models"))
    return run_cases({name: case for name, (case, _) in METHODS.items()}, paths, LAYOUTS)


@pytest.mark.parametrize("name", METHODS)
def test_gradients(found, name: str) -> None:
    case, loss = METHODS[name]
    expected = reference_gradients(found.paths, loss, case.moved)
    assert max(float(np.abs(values).max()) for values in expected.values()) > 1e-6
    for layout in LAYOUTS:
        assert_same_gradients(found.results[layout][name].gradients, expected)


# Metrics per token: (own tokens that run, distilled tokens with their divergence before any weight), by definition.


def distilled_by_demonstration(group: Group, i: int, sample: Sample) -> bool:
    return sample.reward == 0.0 and demonstration(group, i) is not None


def plain_jsd(models: Models, group: Group, i: int, ids: np.ndarray) -> list[float]:
    before = models.before(group.prompt_ids, ids)
    taught = models.teacher(PROMPTS.hinted(group.problem, demonstration(group, i)), ids)
    supports = [z_V.topk(K).indices for z_V in before]
    return [
        float(jsd(buckets(logp(p_V), s), buckets(logp(q_V), s), 0.5))
        for p_V, q_V, s in zip(taught, models.student(group.prompt_ids, ids), supports, strict=True)
    ]


def forward_kls(models: Models, group: Group, ids: np.ndarray, clip: float = math.inf) -> list[float]:
    taught = models.teacher(PROMPTS.privileged_prompt(group.problem), ids)
    supports = [z_V.topk(K).indices for z_V in taught]
    return [
        float(clipped_forward_kl(buckets(logp(p_V), s), buckets(logp(q_V), s), clip))
        for p_V, q_V, s in zip(taught, models.student(group.prompt_ids, ids), supports, strict=True)
    ]


def entropies(models: Models, group: Group, ids: np.ndarray, temperature: float) -> list[float]:
    logprobs_TV = torch.log_softmax(models.student(group.prompt_ids, ids) / temperature, -1)
    return (-(logprobs_TV.exp() * logprobs_TV).sum(-1)).tolist()


def opsd_tokens(models: Models) -> tuple[list[float], list[float], list[float]]:
    own = [h for group, _, _, ids in samples_of(groups()) for h in entropies(models, group, ids, 1.0)]
    return own, own, [d for group, _, _, ids in samples_of(groups()) for d in forward_kls(models, group, ids, 0.05)]


def sdpo_tokens(models: Models) -> tuple[list[float], list[float], list[float]]:
    shown = [(group, i, ids) for group, i, _, ids in samples_of(groups()) if demonstration(group, i)]
    own = [h for group, _, ids in shown for h in entropies(models, group, ids, 0.9)]
    return own, own, [d for group, i, ids in shown for d in plain_jsd(models, group, i, ids)]


def srpo_tokens(models: Models) -> tuple[list[float], list[float], list[float]]:
    own, taught, divergences = [], [], []
    for group, i, sample, ids in samples_of(groups()):
        entropy, distilled = entropies(models, group, ids, 0.9), distilled_by_demonstration(group, i, sample)
        if distilled or len({s.reward for s in group.samples}) == 2:
            own += entropy
        if distilled:
            taught += entropy
            divergences += plain_jsd(models, group, i, ids)
    return own, taught, divergences


def paced_first_tokens(models: Models) -> tuple[list[float], list[float], list[float]]:
    taught = [(g, s) for g in groups_with_teachers_rollouts() for s in g.privileged_samples if s.reward == 1.0]
    rollouts = [(group, sample.completion.token_ids) for group, sample in taught]
    entropy = [h for group, ids in rollouts for h in entropies(models, group, ids, 1.0)]
    return [], entropy, [d for group, ids in rollouts for d in forward_kls(models, group, ids)]


TOKENS = {"opsd": opsd_tokens, "sdpo": sdpo_tokens, "srpo": srpo_tokens, "paced_first": paced_first_tokens}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TOKENS)
@torch.no_grad()
def test_entropy_and_divergence_are_means_over_tokens(found, name: str, layout: str) -> None:
    own, taught, divergences = TOKENS[name](Models(found.paths))
    metrics = found.results[layout][name].metrics
    assert metrics["distill/tokens"] == len(taught) == len(divergences) > 0
    assert metrics["distill/entropy"] == pytest.approx(np.mean(taught), rel=1e-5)
    assert metrics["distill/divergence"] == pytest.approx(np.mean(divergences), rel=1e-4)
    assert metrics.get("train/entropy_tokens", 0) == len(own)
    assert metrics.get("train/entropy") == (pytest.approx(np.mean(own), rel=1e-5) if own else None)
