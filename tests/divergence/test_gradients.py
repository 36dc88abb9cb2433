"""Values and gradients of the fused pass against the definitions, on one rank and over shards."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from divergence_cases import KINDS, TAILS, Case, assert_agrees, cases, engine, has_meaning, reference
from divergence_ranks import Ranks
from hypothesis import HealthCheck, given, settings

from megatron_hdpo.divergence import DivergenceSpec, logit_losses, vocab_parallel_topk


def run_case(group: Any, rank: int, size: int, case: Case) -> dict[str, torch.Tensor]:
    return engine(case, group, rank, size)


def each_combination() -> list[Case]:
    """Return each kind, tail and dtype that can be combined, with padding, rows without target, two temperatures."""
    every = []
    for kind, tail, dtype in itertools.product(KINDS, TAILS, ("float64", "float32", "bfloat16")):
        if has_meaning(kind, 0.5, tail, None):
            case = Case(kind, 0.5, tail, None, "topk", dtype, subset=True, temperature=0.7, inplace=True)
            every.append(case)
    for kind, target, dtype in itertools.product(KINDS, ("full", "hidden"), ("float64", "float32", "bfloat16")):
        every.append(Case(kind, 0.5, "outside", None, target, dtype, subset=True, temperature=0.7, inplace=True))
    return every


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_kind_tail_and_type_over_shards(ranks: Ranks, size: int) -> None:
    for case in each_combination():
        assert_agrees(case, ranks.run(size, run_case, case), reference(case))


@given(case=cases())
@settings(max_examples=150, deadline=None)
def test_any_case_on_one_rank(case: Case) -> None:
    assert_agrees(case, [engine(case, None, 0, 1)], reference(case))


@pytest.mark.parametrize("size", [2, 4])
@given(case=cases())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_case_over_shards(ranks: Ranks, size: int, case: Case) -> None:
    assert_agrees(case, ranks.run(size, run_case, case), reference(case))


@pytest.mark.parametrize("kind", ["jsd", "reverse_kl", "skew_reverse"])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_gradient_is_the_slope_of_the_value(kind: str, tail: str) -> None:
    """Finite differences of the engine's own value: no formula on either side."""
    gen = torch.Generator().manual_seed(3)
    z = torch.randn(3, 12, generator=gen, dtype=torch.float64, requires_grad=True)
    target = vocab_parallel_topk(torch.randn(3, 12, generator=gen, dtype=torch.float64), 4, vocab_size=11)
    ids = torch.tensor([0, 5, -1])

    def outputs(z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        spec = DivergenceSpec(kind, tail=tail)
        losses = logit_losses(z, ids, target, spec=spec, vocab_size=11, temperature=0.8)
        assert losses.logprobs_T is not None and losses.entropy_T is not None and losses.divergence_T is not None
        return losses.logprobs_T, losses.entropy_T, losses.divergence_T

    assert torch.autograd.gradcheck(outputs, (z,))
