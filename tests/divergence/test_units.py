"""Orientation, limits and constants of the divergences, what is refused, and the small functions beside them."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from divergence_ranks import Ranks
from torch import Tensor

from megatron_hdpo.divergence import (
    DivergenceSpec,
    FullLogits,
    Hidden,
    TopK,
    divergence,
    head_losses,
    logit_losses,
    row_stats,
    vocab_parallel_entropy,
    vocab_parallel_logprobs,
    vocab_parallel_topk,
)

GEN = torch.Generator().manual_seed(0)
Z = torch.randn(5, 12, generator=GEN, dtype=torch.float64)
TEACHER = torch.randn(5, 12, generator=GEN, dtype=torch.float64)
Q, P = Z.softmax(-1), TEACHER.softmax(-1)


def test_beta_weighs_the_teacher() -> None:
    m = 0.2 * P + 0.8 * Q
    want = 0.2 * (P * (P / m).log()).sum(-1) + 0.8 * (Q * (Q / m).log()).sum(-1)
    torch.testing.assert_close(divergence(Z, FullLogits(TEACHER), DivergenceSpec("jsd", beta=0.2)), want)


def test_the_ends_of_beta_are_the_two_kls() -> None:
    forward, reverse = (P * (P / Q).log()).sum(-1), (Q * (Q / P).log()).sum(-1)
    for kind, beta, want in [
        ("jsd", 0.0, forward),
        ("jsd", 1.0, reverse),
        ("forward_kl", 0.5, forward),
        ("reverse_kl", 0.5, reverse),
        ("skew_forward", 0.0, forward),
        ("skew_reverse", 0.0, reverse),
    ]:
        torch.testing.assert_close(divergence(Z, FullLogits(TEACHER), DivergenceSpec(kind, beta=beta)), want)
    near = divergence(Z, FullLogits(TEACHER), DivergenceSpec("jsd", beta=1e-6)) / 1e-6
    torch.testing.assert_close(near, forward, rtol=1e-4, atol=1e-4)  # as coded everywhere, the family jumps at its ends


def test_disjoint_supports_reach_the_bound_and_literal_exceeds_it() -> None:
    """methods of the field: exact JSD is at most ln 2; the constant as printed gives 1.5 ln 2."""
    z = torch.full((1, 8), -60.0, dtype=torch.float64)
    z[0, 7] = 60.0
    target = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]], dtype=torch.float64).log())
    assert float(divergence(z, target)) == pytest.approx(math.log(2.0))
    assert float(divergence(z, target, DivergenceSpec(tail="literal"))) == pytest.approx(1.5 * math.log(2.0))


def test_truncated_teacher_leaves_the_documented_residue() -> None:
    """A student equal to the full teacher pays for the mass outside the top-k, and nothing under `bucket`."""
    target = vocab_parallel_topk(TEACHER, 4)
    rho = target.logprobs_TK.exp().sum(-1)
    want = 0.5 * (2 / (1 + rho)).log() + 0.5 * (rho * (2 * rho / (1 + rho)).log() + (1 - rho) * math.log(2.0))
    torch.testing.assert_close(divergence(TEACHER, target), want)
    bucket = divergence(TEACHER, target, DivergenceSpec(tail="bucket"))
    torch.testing.assert_close(bucket, torch.zeros(5, dtype=torch.float64))


def test_gradient_outside_the_support_pushes_down() -> None:
    z = Z.clone().requires_grad_()
    target = vocab_parallel_topk(TEACHER, 3)
    divergence(z, target).sum().backward()
    outside = torch.ones_like(Z, dtype=torch.bool).scatter(1, target.ids_TK, False)
    assert z.grad is not None and bool((z.grad[outside] >= 0).all())
    torch.testing.assert_close(z.grad.sum(-1), torch.zeros(5, dtype=torch.float64))


def test_bucket_never_exceeds_the_full_divergence() -> None:
    for kind in ("jsd", "forward_kl", "reverse_kl"):
        coarse = divergence(Z, vocab_parallel_topk(TEACHER, 4), DivergenceSpec(kind, tail="bucket"))
        assert bool((coarse <= divergence(Z, FullLogits(TEACHER), DivergenceSpec(kind)) + 1e-12).all())


def test_opsd_clip_gradient() -> None:
    """Forward KL: g_u = q_u sum_{v not clipped} p_v - p_u 1[u not clipped]; a negative total is not an error."""
    z = Z.clone().requires_grad_()
    value = divergence(z, FullLogits(TEACHER), DivergenceSpec("forward_kl", clip=0.01))
    value.sum().backward()
    keep = P * (P / Q).log() <= 0.01
    assert bool((value < 0).any()) and not bool(keep.all())
    torch.testing.assert_close(z.grad, Q * (P * keep).sum(-1, keepdim=True) - P * keep)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (dict(kind="reverse_kl"), "bucket"),
        (dict(kind="akl"), "bucket"),
        (dict(kind="jsd", beta=1.0), "bucket"),
        (dict(kind="skew_reverse", beta=0.0), "bucket"),
        (dict(kind="forward_kl", tail="literal"), "outside"),
        (dict(beta=0.3, tail="literal"), "outside"),
        (dict(clip=0.1, tail="literal"), "outside"),
        (dict(kind="kl"), "forward_kl"),
        (dict(tail="topk"), "bucket"),
        (dict(beta=1.5), r"\[0, 1\]"),
        (dict(clip=0.0), "positive"),
        (dict(temperature=0.0), "positive"),
        (dict(vocab_size=13), "vocab_size is 13"),
    ],
)
def test_meaningless_options_are_refused_with_a_way_out(options: dict[str, Any], advice: str) -> None:
    of_spec = {name: value for name, value in options.items() if name in ("kind", "beta", "tail", "clip")}
    others = {name: value for name, value in options.items() if name not in of_spec}
    with pytest.raises(ValueError, match=advice):
        divergence(Z, vocab_parallel_topk(TEACHER, 3), DivergenceSpec(**of_spec), **others)


IDS = torch.zeros(5, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        (TopK(IDS, torch.zeros(5, 3)), "one shape"),
        (TopK(IDS[:, :0], torch.zeros(5, 0)), "K at least 1"),
        (TopK(IDS + 12, torch.zeros(5, 2)), "holds id 12"),
        (TopK(IDS[:3], torch.zeros(3, 2)), "3 rows for 5 tokens"),
        (TopK(IDS[:2], torch.zeros(2, 2), torch.tensor([3, 1])), "strictly increasing"),
        (TopK(IDS[:2], torch.zeros(2, 2), torch.tensor([3, 5])), r"\[0, 5\)"),
        (TopK(IDS[:2], torch.zeros(2, 2), torch.tensor([3])), r"int64 \[2\]"),
        (FullLogits(torch.zeros(5, 11)), "11 columns"),
        (Hidden(torch.zeros(5, 4), torch.zeros(12, 3)), r"\[12, 4\]"),
    ],
)
def test_targets_that_do_not_fit_are_refused(target: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        divergence(Z, target)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="sampled_ids holds id 12"):
        logit_losses(Z, torch.full((5,), 12))
    with pytest.raises(ValueError, match="sampled ids have shape"):
        logit_losses(Z, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="ids have shape"):
        vocab_parallel_logprobs(Z, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="k = 13"):
        vocab_parallel_topk(Z, 13)
    with pytest.raises(ValueError, match="head weight"):
        head_losses(torch.zeros(5, 4), torch.zeros(12, 3), IDS[:, 0])
    with pytest.raises(ValueError, match="chunk is 0"):
        head_losses(torch.zeros(5, 4), torch.zeros(12, 4), IDS[:, 0], chunk=0)


def test_a_second_use_of_overwritten_logits_is_an_error() -> None:
    z = Z.clone().requires_grad_()
    logits = z * 1.0
    first, second = vocab_parallel_entropy(logits, inplace_backward=True), vocab_parallel_entropy(logits)
    first.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.sum().backward()


def test_no_graph_is_kept_alive_by_the_pass() -> None:
    """A reference cycle through the saved pass would keep every step's logits until the garbage collector runs."""
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        for target in (vocab_parallel_topk(TEACHER, 3), FullLogits(TEACHER)):
            logits = (Z.clone().requires_grad_()) * 1.0
            alive = weakref.ref(logits)
            losses = logit_losses(logits, IDS[:, 0], target)
            del logits, losses
            assert alive() is None
    finally:
        gc.enable()


def topk_and_logprobs(group: Any, rank: int, size: int, k: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(k)
    logits = torch.randn(2, 3, 16, generator=gen, dtype=torch.float64).to(dtype)
    ids = torch.randint(-1, 9, (2, 3, 4), generator=gen)
    ids[..., 1] = ids[..., 0]
    weight = torch.randn(2, 3, 4, generator=gen, dtype=torch.float64)
    mine = logits[..., rank * 16 // size : (rank + 1) * 16 // size].clone().requires_grad_()
    top = vocab_parallel_topk(mine, k, group, vocab_size=9, temperature=0.5)
    at = vocab_parallel_logprobs(mine, ids, 0.5, group, 9)
    (at * weight).sum().backward()
    whole = logits.double()[..., :9].requires_grad_()
    logprobs = (whole / 0.5).log_softmax(-1)
    want = logprobs.gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, 0.0)
    (want * weight).sum().backward()
    gradient = torch.cat([whole.grad, whole.new_zeros(2, 3, 7)], dim=-1)[
        ..., rank * 16 // size : (rank + 1) * 16 // size
    ]
    want_top = logprobs.topk(k, dim=-1)
    answer = top.ids_TK, top.logprobs_TK, want_top.values, logprobs, at, want, mine.grad, gradient
    return tuple(x.detach() for x in answer)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_topk_and_logprobs_over_shards(ranks: Ranks, size: int, dtype: torch.dtype) -> None:
    """k past a shard's width, padding on whole ranks, ids that repeat in a row, ids that are none."""
    eps = 1e-12 if dtype == torch.float64 else 1e-5
    for k in (1, 5, 9):
        for answer in ranks.run(size, topk_and_logprobs, k, dtype):
            top_ids, top, want_top, logprobs, at, want, got_gradient, gradient = answer
            torch.testing.assert_close(top.double(), want_top, rtol=eps, atol=eps)
            torch.testing.assert_close(logprobs.gather(-1, top_ids), want_top, rtol=eps, atol=eps)
            assert all(len(set(row)) == k for row in top_ids.flatten(0, 1).tolist())
            torch.testing.assert_close(at.double(), want, rtol=eps, atol=eps)
            room = 2.0**-8 if dtype == torch.bfloat16 else eps
            torch.testing.assert_close(got_gradient.double(), gradient, rtol=room, atol=10 * eps)


def test_underflowing_probabilities_stay_finite_and_right() -> None:
    """Teacher and student log-probs far below what float32 can exponentiate."""
    target = TopK(torch.tensor([[0, 1, 2]]), torch.tensor([[-200.0, -1e-4, -250.0]]))
    for kind in ("jsd", "forward_kl", "reverse_kl", "skew_forward", "skew_reverse"):
        for tail, top in (("bucket", 60.0), ("renormalise", 300.0)):
            z = torch.zeros(1, 6)
            z[0, 0] = top
            low = z.clone().requires_grad_()
            spec = DivergenceSpec(kind, tail=tail)
            value = divergence(low, target, spec)
            value.sum().backward()
            high = z.double().requires_grad_()
            exact = divergence(high, TopK(target.ids_TK, target.logprobs_TK.double()), spec)
            exact.sum().backward()
            assert low.grad is not None and high.grad is not None
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(low.grad.double(), high.grad, rtol=1e-4, atol=1e-5)


def test_package_imports_with_torch_alone() -> None:
    code = (
        "import sys; import torch; before = set(sys.modules)\n"
        "import megatron_hdpo.divergence\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(' '.join(sorted(new)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["megatron_hdpo"]


def test_spec_names_every_kind_and_tail() -> None:
    with pytest.raises(ValueError, match="jsd, forward_kl, reverse_kl, skew_forward, skew_reverse, akl"):
        DivergenceSpec("js")


@pytest.mark.parametrize("shift", [0.0, 60.0, -60.0, 300.0, -300.0])
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("mkl", [True, False])
def test_results_do_not_depend_on_where_the_logits_lie(
    shift: float, entropy: bool, mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of exponentials that need no maximum, and those that would overflow or vanish without one, in both bases."""
    monkeypatch.setattr(row_stats, "_mkl_is_fast", lambda: mkl)
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 40, generator=gen) + shift * torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.5]).unsqueeze(-1)
    target = TopK(torch.arange(4).repeat(6, 1), torch.full((6, 4), 0.2).log())
    spec, ids, results = DivergenceSpec(tail="bucket"), torch.arange(6), []
    for dtype, distill in itertools.product((torch.float32, torch.float64), (0.7, 1.3)):
        z = logits.detach().to(dtype, copy=True).requires_grad_()
        losses = logit_losses(z, ids, target, spec=spec, temperature=0.7, distill_temperature=distill, entropy=entropy)
        assert losses.logprobs_T is not None and losses.divergence_T is not None
        (losses.logprobs_T + losses.divergence_T).sum().backward()
        results.append([losses.logprobs_T, losses.divergence_T, z.grad])
    for low, high in zip(results[:2], results[2:], strict=True):
        for one, exact in zip(low, high, strict=True):
            torch.testing.assert_close(one.double(), exact, rtol=1e-4, atol=1e-4)
