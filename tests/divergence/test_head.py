"""The chunked head against an unchunked one by definition: values, and gradients of hidden states and head weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from divergence_cases import Case, Tensors, build, has_meaning, reference
from divergence_ranks import Ranks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_hdpo.divergence import FullLogits, Hidden, Losses, head_loss, head_losses
from megatron_hdpo.divergence.head_run import Chunk

HIDDEN = 6


def head_inputs(case: Case) -> tuple[Tensors, Tensor, Tensor]:
    """A case whose student logits come from hidden states [T, H] and a head [V, H]."""
    data = build(case)
    gen = torch.Generator().manual_seed(case.seed + 1)
    hidden = torch.randn(case.tokens, HIDDEN, generator=gen, dtype=torch.float64).to(data.logits_TV.dtype)
    head = (torch.randn(case.columns, HIDDEN, generator=gen, dtype=torch.float64) * case.scale / 2).to(hidden.dtype)
    return data, hidden, head


def engine(group: Any, rank: int, size: int, case: Case, way: str, chunk: int, sp: bool) -> dict[str, Tensor]:
    data, hidden, head = head_inputs(case)
    shard = slice(rank * case.columns // size, (rank + 1) * case.columns // size)
    mine = slice(rank * case.tokens // size, (rank + 1) * case.tokens // size) if sp else slice(None)
    hidden, head = hidden[mine].clone().requires_grad_(), head[shard].clone().requires_grad_()
    target: Any = data.topk
    if case.target == "full":
        target = FullLogits(data.teacher_RV[:, shard], data.rows)
    if case.target == "hidden":
        target = Hidden(data.teacher_hidden_RH, data.teacher_head_VH[shard], data.rows)
    options: dict[str, Any] = dict(
        spec=case.spec, temperature=case.temperature, distill_temperature=case.distill_temperature, chunk=chunk,
        group=group, vocab_size=case.vocab, sequence_parallel=sp,
    )  # fmt: skip
    up_3T = data.upstream_3T

    def objective(losses: Losses, chunk: Chunk | None = None) -> Tensor:
        up = up_3T if chunk is None else chunk.take(up_3T.t()).t()
        assert losses.logprobs_T is not None and losses.entropy_T is not None and losses.divergence_T is not None
        return (up[0] * losses.logprobs_T + up[1] * losses.entropy_T + up[2] * losses.divergence_T).sum()

    if way == "head_loss":
        total, losses = head_loss(hidden, head, data.ids_T, objective, target, **options)
        (total * 1.0).backward()
    else:
        losses = head_losses(hidden, head, data.ids_T, target, **options)
        objective(losses).backward()
    out = {name: value.detach() for name, value in vars(losses).items()}
    return {**out, "hidden": hidden.grad, "head": head.grad}


def wanted(case: Case) -> dict[str, Tensor]:
    """Compute the expected results: the reference's logit gradient, multiplied through the head."""
    _, hidden, head = head_inputs(case)
    logits = (hidden.double() @ head.double().t()).to(hidden.dtype)
    by_logits = reference(case, logits)
    gradient = by_logits.pop("gradient")
    return {**by_logits, "hidden": gradient @ head.double(), "head": gradient.t() @ hidden.double()}


def assert_head_agrees(case: Case, got: list[dict[str, Tensor]], want: dict[str, Tensor], sp: bool) -> None:
    eps = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 4e-2}[case.dtype]
    for one in got:
        for name, value in want.items():
            if name not in ("hidden", "head"):
                torch.testing.assert_close(one[name].double(), value, rtol=eps, atol=eps, msg=lambda m: f"{m} {case}")
    head = torch.cat([one["head"] for one in got])
    torch.testing.assert_close(head.double(), want["head"], rtol=eps, atol=eps * case.scale * 3)
    assert not head[case.vocab :].any(), "padding rows of the head have a gradient"
    hidden = [torch.cat([one["hidden"] for one in got])] if sp else [one["hidden"] for one in got]
    for whole in hidden:
        torch.testing.assert_close(whole.double(), want["hidden"], rtol=eps, atol=eps * case.scale * 3)


BASE = Case("jsd", 0.5, "outside", None, "topk", tokens=8, subset=True, temperature=0.7)


@st.composite
def head_cases(draw: Any) -> tuple[Case, str, int]:
    kind, tail = draw(
        st.tuples(
            st.sampled_from(["jsd", "forward_kl", "reverse_kl", "akl"]), st.sampled_from(["outside", "bucket"])
        ).filter(lambda o: has_meaning(o[0], 0.5, o[1], None))
    )
    case = replace(
        BASE,
        kind=kind,
        tail=tail,
        clip=draw(st.sampled_from([None, 0.05])),
        target=draw(st.sampled_from(["topk", "full", "hidden"])),
        dtype=draw(st.sampled_from(["float64", "float64", "float32"])),
        tokens=draw(st.sampled_from([0, 4, 8, 12])),
        subset=draw(st.booleans()),
        ragged=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )
    return case, draw(st.sampled_from(["head_loss", "head_losses"])), draw(st.sampled_from([1, 3, 5, 64]))


@pytest.mark.parametrize(("size", "sp"), [(1, False), (2, False), (2, True), (4, True)])
@given(drawn=head_cases())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_chunked_head_over_shards(ranks: Ranks, size: int, sp: bool, drawn: tuple[Case, str, int]) -> None:
    case, way, chunk = drawn
    got = ranks.run(size, engine, case, way, chunk, sp)
    assert_head_agrees(case, got, wanted(case), sp)


@pytest.mark.parametrize("way", ["head_loss", "head_losses"])
@pytest.mark.parametrize("target", ["topk", "full", "hidden"])
def test_chunked_head_in_bfloat16(way: str, target: str) -> None:
    case = replace(BASE, dtype="bfloat16", target=target)
    assert_head_agrees(case, [engine(None, 0, 1, case, way, 3, False)], wanted(case), False)


def cp_half(group: Any, rank: int, size: int, case: Case) -> Tensor:
    """Context parallel: half of the tokens (a piece from the front, one from the back), all the vocabulary."""
    data, hidden, head = head_inputs(case)
    quarters = torch.arange(case.tokens).chunk(2 * size)
    mine = torch.cat([quarters[rank], quarters[2 * size - 1 - rank]])
    head = head.clone().requires_grad_()
    topk = type(data.topk)(data.topk.ids_TK[mine], data.topk.logprobs_TK[mine])
    losses = head_losses(hidden[mine], head, data.ids_T[mine], topk, chunk=3, vocab_size=case.vocab)
    up = data.upstream_3T[:, mine]
    torch.autograd.backward([losses.logprobs_T, losses.entropy_T, losses.divergence_T], [up[0], up[1], up[2]])
    torch.distributed.all_reduce(head.grad, group=group)
    return head.grad


def test_context_parallel_halves_add_up_to_the_whole(ranks: Ranks) -> None:
    case = replace(BASE, subset=False, temperature=1.0)
    for gradient in ranks.run(2, cp_half, case):
        torch.testing.assert_close(gradient, wanted(case)["head"], rtol=1e-9, atol=1e-9)


def test_leading_shapes_of_megatron() -> None:
    """[s, b, H] with ids [s, b] gives [s, b], and the same numbers as flat tokens."""
    data, hidden, head = head_inputs(replace(BASE, subset=False))
    flat = head_losses(hidden, head, data.ids_T, data.topk, vocab_size=BASE.vocab)
    k = data.topk.ids_TK.shape[-1]
    topk = type(data.topk)(data.topk.ids_TK.view(4, 2, k), data.topk.logprobs_TK.view(4, 2, k))
    shaped = head_losses(hidden.view(4, 2, -1), head, data.ids_T.view(4, 2), topk, vocab_size=BASE.vocab)
    assert shaped.divergence_T is not None and flat.divergence_T is not None
    assert shaped.divergence_T.shape == (4, 2)
    torch.testing.assert_close(shaped.divergence_T.flatten(), flat.divergence_T)


def test_an_objective_without_gradient_gives_none() -> None:
    data, hidden, head = head_inputs(BASE)
    hidden.requires_grad_()
    total, _ = head_loss(hidden, head, data.ids_T, lambda losses, chunk: torch.zeros(()), data.topk)
    total.backward()
    assert hidden.grad is not None and not hidden.grad.any()
