"""OPD, vOPD and AKL: gradients by parameter against their definitions in float64, on several layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from method_gradients import (
    Case,
    Found,
    Models,
    assert_same_gradients,
    hand_made_groups,
    make_models,
    reference_gradients,
    run_cases,
    sample_of,
)
from torch import Tensor

from megatron_hdpo.objectives.akl import AKLConfig, build_akl
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.opd import OPDConfig, build_opd
from megatron_hdpo.objectives.vopd import VOPD, VOPDConfig
from megatron_hdpo.types.learning import Objective
from megatron_hdpo.types.rollouts import Group, Sample

TEMPERATURE, K, CLIP = 0.8, 6, 0.2


def responses(groups: list[Group]) -> Iterator[tuple[np.ndarray, np.ndarray, Sample]]:
    for group in groups:
        for sample in group.samples:
            yield group.prompt_ids, sample.completion.token_ids, sample


def tokens_of(groups: list[Group]) -> int:
    return sum(len(ids) for _, ids, _ in responses(groups))


def sampled(logits: Tensor, ids: np.ndarray, temperature: float = 1.0) -> Tensor:
    logprobs = torch.log_softmax(logits / temperature, -1)
    return logprobs[torch.arange(len(ids)), torch.from_numpy(ids).long()]


def single_sample(
    moved: bool, clamp: Callable[[Tensor, Tensor], Tensor], baseline: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Models], Tensor]:
    """-sum min(A ratio, A clip(ratio)) / tokens; the ratio is to the policy before the step if that moved, else 1.

    clamp: (student, teacher log-probs [T]) -> r. baseline: (student, teacher log-probs [T, V]) -> V(s).
    """

    def loss(models: Models) -> Tensor:
        groups, total = hand_made_groups(), torch.zeros(()).double()
        for prompt, ids, _ in responses(groups):
            own = sampled(models.student(prompt, ids), ids, TEMPERATURE)
            student, teacher = models.before(prompt, ids) / TEMPERATURE, models.teacher(prompt, ids) / TEMPERATURE
            old = sampled(student, ids)
            value = clamp(old, sampled(teacher, ids)) - baseline(student.log_softmax(-1), teacher.log_softmax(-1))
            ratio = (own - (old if moved else own.detach())).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            total = total - torch.minimum(value * ratio, value * clipped).sum()
        return total / tokens_of(groups)

    return loss


def plain_ratio(student: Tensor, teacher: Tensor) -> Tensor:
    return teacher - student


def clamped_ratio(student: Tensor, teacher: Tensor) -> Tensor:
    return (teacher.clamp_min(-6.0) - student.clamp_min(-6.0)).clamp(-0.7, 0.7)


def nothing(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.zeros(()).double()


def minus_full_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return -(student.exp() * (student - teacher)).sum(-1)


def minus_top_k_kl(student: Tensor, teacher: Tensor) -> Tensor:
    ids = student.topk(K, -1).indices
    lq, lp = (side.gather(-1, ids).log_softmax(-1) for side in (student, teacher))
    return -(lq.exp() * (lq - lp)).sum(-1)


def full_kl(models: Models) -> Tensor:
    """Mean over tokens of KL(q || p), at distill.temperature 1.3."""
    groups, total = hand_made_groups(), torch.zeros(()).double()
    for prompt, ids, _ in responses(groups):
        lq, lp = ((f(prompt, ids) / 1.3).log_softmax(-1) for f in (models.student, models.teacher))
        total = total + (lq.exp() * (lq - lp)).sum()
    return total / tokens_of(groups)


def top_k_kl(models: Models) -> Tensor:
    """KL of the k + 1 buckets, S the top k of the student before the step."""
    groups, total = hand_made_groups(), torch.zeros(()).double()
    for prompt, ids, _ in responses(groups):
        best = models.before(prompt, ids).topk(K, -1).indices
        q, p = (with_rest(f(prompt, ids).softmax(-1).gather(-1, best)) for f in (models.student, models.teacher))
        total = total + (q * (q / p).log()).sum()
    return total / tokens_of(groups)


def with_rest(masses_TK: Tensor) -> Tensor:
    return torch.cat([masses_TK, 1 - masses_TK.sum(-1, keepdim=True)], -1)


def adaptive(p: Tensor, q: Tensor) -> Tensor:
    """AKL of two rows of entries, head mass 1/2, by a loop."""
    gap = (p - q.detach()).abs()
    mass, head = 0.0, 0.0
    for rank, v in enumerate(p.argsort(descending=True).tolist()):
        mass += float(p[v])
        if rank and mass > 0.5:
            break
        head += float(gap[v])
    share = head / float(gap.sum())
    forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    return share * forward + (1 - share) * reverse


def adaptive_on(
    groups: Callable[[], list[Group]], teacher: str, rollouts: str, full: bool
) -> Callable[[Models], Tensor]:
    """Mean of AKL over tokens: of the whole vocabulary, or of the teacher's top k and a bucket."""

    def loss(models: Models) -> Tensor:
        total, count = torch.zeros(()).double(), 0
        for group in groups():
            for sample in getattr(group, rollouts):
                ids = sample.completion.token_ids
                context = group.prompt_ids if rollouts == "samples" else group.privileged_prompt_ids
                p, q = (
                    getattr(models, teacher)(context, ids).softmax(-1),
                    models.student(group.prompt_ids, ids).softmax(-1),
                )
                if not full:
                    best = p.topk(K, -1).indices
                    p, q = with_rest(p.gather(-1, best)), with_rest(q.gather(-1, best))
                total = total + sum(adaptive(p[t], q[t]) for t in range(len(ids)))
                count += len(ids)
        return total / count

    return loss


def groups_with_privileged() -> list[Group]:
    rng = np.random.default_rng(11)
    groups = hand_made_groups()[:3]
    for group in groups[1:]:
        group.privileged_prompt_ids = rng.integers(0, 299, 8).astype(np.int32)
        group.privileged_samples = [sample_of(rng, 0.0, 6), sample_of(rng, 1.0, 3)]
    return groups


def _opd(updates: int = 1, **keys: object) -> Objective:
    return build_opd(OPDConfig.model_validate(keys), ObjectiveDeps(TEMPERATURE, updates))


def opd_single() -> Objective:
    return _opd()


def opd_clamped() -> Objective:
    return _opd(clamp={"logprob": -6.0, "log_ratio": 0.7})


def opd_moved() -> Objective:
    return _opd(updates=2)


def opd_full() -> Objective:
    return _opd(estimator="full", distill={"coefficient": 1.0, "kind": "reverse_kl", "temperature": 1.3})


def opd_top_k() -> Objective:
    keys = {"coefficient": 1.0, "kind": "reverse_kl", "tail": "bucket", "support": "student", "top_k": K}
    return _opd(estimator="top_k", distill=keys)


def _vopd(kind: str, updates: int = 1) -> Objective:
    config = VOPDConfig.model_validate({"baseline": {"kind": kind, "top_k": K}})
    return VOPD(config, ObjectiveDeps(TEMPERATURE, updates))


def vopd_full() -> Objective:
    return _vopd("full")


def vopd_top_k() -> Objective:
    return _vopd("top_k")


def vopd_none() -> Objective:
    return _vopd("none")


def vopd_moved() -> Objective:
    return _vopd("full", updates=2)


def _akl(tokens: str, **keys: object) -> Objective:
    distill = {"coefficient": 1.0, "kind": "akl", "tail": "bucket", "top_k": K, **keys}
    return build_akl(AKLConfig.model_validate({"tokens": tokens, "distill": distill}), ObjectiveDeps(TEMPERATURE))


def akl_student() -> Objective:
    return _akl("student")


def akl_full() -> Objective:
    return _akl("student", support="full")


def akl_teacher() -> Objective:
    return _akl("teacher")


def akl_teacher_full_moved() -> Objective:
    """The policy teaches itself by its hidden states, and then moves: its head must be that of before."""
    return _akl("teacher", support="full")


G, GP = hand_made_groups, groups_with_privileged
EXPECTED: dict[str, tuple[Case, Callable[[Models], Tensor]]] = {
    "opd_single": (Case(opd_single, G), single_sample(False, plain_ratio, nothing)),
    "opd_clamped": (Case(opd_clamped, G), single_sample(False, clamped_ratio, nothing)),
    "opd_moved": (Case(opd_moved, G, moved=True), single_sample(True, plain_ratio, nothing)),
    "opd_full": (Case(opd_full, G, head_chunk=7), full_kl),
    "opd_full_moved": (Case(opd_full, G, moved=True), full_kl),
    "opd_top_k": (Case(opd_top_k, G), top_k_kl),
    "opd_top_k_moved": (Case(opd_top_k, G, moved=True, budget=1000), top_k_kl),
    "vopd_full": (Case(vopd_full, G), single_sample(False, plain_ratio, minus_full_kl)),
    "vopd_top_k": (Case(vopd_top_k, G), single_sample(False, plain_ratio, minus_top_k_kl)),
    "vopd_moved": (Case(vopd_moved, G, moved=True), single_sample(True, plain_ratio, minus_full_kl)),
    "vopd_none": (Case(vopd_none, G), single_sample(False, plain_ratio, nothing)),
    "akl_student": (Case(akl_student, G), adaptive_on(G, "teacher", "samples", full=False)),
    "akl_full": (Case(akl_full, G), adaptive_on(G, "teacher", "samples", full=True)),
    "akl_teacher": (Case(akl_teacher, GP, teacher=None), adaptive_on(GP, "before", "privileged_samples", full=False)),
    "akl_teacher_full_moved": (
        Case(akl_teacher_full_moved, GP, teacher=None, moved=True),
        adaptive_on(GP, "before", "privileged_samples", full=True),
    ),
}
LAYOUTS = ["one_rank", "cp2", "pp2", "tp2_dp2"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    cases = {name: case for name, (case, _) in (EXPECTED).items()}
    return run_cases(cases, make_models(tmp_path_factory.mktemp("models")), LAYOUTS)


@pytest.fixture(scope="module")
def expected(found: Found) -> dict[str, dict[str, np.ndarray]]:
    return {n: reference_gradients(found.paths, loss, case.moved) for n, (case, loss) in (EXPECTED).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EXPECTED)
def test_gradients(name: str, layout: str, found: Found, expected: dict[str, dict[str, np.ndarray]]) -> None:
    assert_same_gradients(found.results[layout][name].gradients, expected[name])
