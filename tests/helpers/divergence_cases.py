"""Random cases: the inputs of one rank, and the expected results from a float64 reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from divergence_reference import full_divergence, logprob_entropy, topk_divergence
from hypothesis import strategies as st
from torch import Tensor

from megatron_hdpo.divergence import DivergenceSpec, FullLogits, Hidden, TopK, logit_losses

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A whole problem, before it is cut into shards. target: topk, full or hidden."""

    kind: str
    beta: float
    tail: str
    clip: float | None
    target: str
    dtype: str = "float64"
    tokens: int = 5
    width: int = 8  # columns of a rank of four
    padding: int = 3  # columns of all ranks that are no tokens
    k: int = 4
    subset: bool = False
    ragged: bool = False
    temperature: float = 1.0
    distill_temperature: float = 1.0
    scale: float = 2.0
    inplace: bool = False
    seed: int = 0

    @property
    def spec(self) -> DivergenceSpec:
        return DivergenceSpec(kind=self.kind, beta=self.beta, tail=self.tail, clip=self.clip)

    @property
    def columns(self) -> int:
        return 4 * self.width

    @property
    def vocab(self) -> int:
        return self.columns - self.padding


@dataclass(frozen=True)
class Tensors:
    """The inputs of a case: student's logits [T, V], sampled ids, upstream weights [3, T], the target in parts."""

    logits_TV: Tensor
    ids_T: Tensor
    upstream_3T: Tensor
    rows: Tensor | None
    topk: TopK
    teacher_RV: Tensor
    teacher_hidden_RH: Tensor
    teacher_head_VH: Tensor


def build(case: Case) -> Tensors:
    gen = torch.Generator().manual_seed(case.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    dtype = DTYPES[case.dtype]
    logits = (case.scale * randn(case.tokens, case.columns)).to(dtype)
    ids = torch.randint(-1, case.vocab, (case.tokens,), generator=gen)
    rows = torch.arange(0, case.tokens, 2) if case.subset else None
    count = case.tokens if rows is None else len(rows)
    hidden, head = randn(count, 6).to(dtype), (case.scale * randn(case.columns, 6) / 2).to(dtype)
    teacher = hidden @ head.t() if case.target == "hidden" else (case.scale * randn(count, case.columns)).to(dtype)
    logprobs = torch.log_softmax(teacher[:, : case.vocab].double() / case.distill_temperature, -1)
    k = min(case.k, case.vocab)
    best = logprobs.topk(k, dim=-1)
    picked, values = best.indices.clone(), best.values.clone()
    if count and case.tokens > 1:
        ids[0] = picked[0, 0]  # a sampled token that is in the support
    if case.ragged and count:
        picked[0, -1] = -1
        values[-1, 0] = -math.inf
        picked[count // 2] = -1  # a row that has no target after all
    compute = torch.float64 if case.dtype == "float64" else torch.float32
    topk = TopK(picked, values.to(compute), rows)
    return Tensors(logits, ids, randn(3, case.tokens).to(compute), rows, topk, teacher, hidden, head)


def engine(case: Case, group: Any, rank: int, size: int) -> dict[str, Tensor]:
    """Compute the outputs of one rank, and the gradient of its shard."""
    data = build(case)
    shard = slice(rank * case.columns // size, (rank + 1) * case.columns // size)
    leaf = data.logits_TV[:, shard].clone().requires_grad_()
    target: Any = data.topk
    if case.target == "full":
        target = FullLogits(data.teacher_RV[:, shard], data.rows)
    if case.target == "hidden":
        target = Hidden(data.teacher_hidden_RH, data.teacher_head_VH[shard], data.rows)
    losses = logit_losses(
        leaf * 1.0 if case.inplace else leaf,
        data.ids_T,
        target,
        spec=case.spec,
        distill_temperature=case.distill_temperature,
        temperature=case.temperature,
        group=group,
        vocab_size=case.vocab,
        inplace_backward=case.inplace,
    )
    out = {name: value.detach() for name, value in vars(losses).items()}
    up = data.upstream_3T
    torch.autograd.backward([losses.logprobs_T, losses.entropy_T, losses.divergence_T], [up[0], up[1], up[2]])
    return {**out, "gradient": leaf.grad}


def reference(case: Case, logits_TV: Tensor | None = None) -> dict[str, Tensor]:
    """Compute the same from the definitions on the whole vocabulary; `logits_TV` replaces the logits of the case."""
    data = build(case)
    if logits_TV is not None:
        data = replace(data, logits_TV=logits_TV)
    leaf = data.logits_TV.double().requires_grad_()
    rows = range(case.tokens) if data.rows is None else data.rows.tolist()
    row_of = {token: r for r, token in enumerate(rows)}
    parts = []
    for t in range(case.tokens):
        logprob, entropy = logprob_entropy(leaf[t, : case.vocab] / case.temperature, int(data.ids_T[t]))
        z = leaf[t, : case.vocab] / case.distill_temperature
        value = z.sum() * 0.0
        if t in row_of and case.target == "topk":
            ids, logprobs = data.topk.ids_TK[row_of[t]], data.topk.logprobs_TK[row_of[t]]
            value = topk_divergence(z, ids, logprobs, case.kind, case.beta, case.tail, case.clip)
        elif t in row_of:
            teacher = data.teacher_RV[row_of[t], : case.vocab].double() / case.distill_temperature
            value = full_divergence(z, teacher, case.kind, case.beta, case.clip)
        parts.append(torch.stack([logprob, entropy, value]))
    whole_3T = torch.stack(parts, dim=1) if parts else leaf.new_zeros(3, 0)
    (leaf.sum() * 0.0 + (whole_3T * data.upstream_3T.double()).sum()).backward()
    assert leaf.grad is not None
    names = ("logprobs_T", "entropy_T", "divergence_T")
    return {**dict(zip(names, whole_3T.detach(), strict=True)), "gradient": leaf.grad, **_diagnostics(case, data)}


def _diagnostics(case: Case, data: Tensors) -> dict[str, Tensor]:
    rows = list(range(case.tokens)) if data.rows is None else data.rows.tolist()
    mass, covered, top = (torch.zeros(case.tokens, dtype=torch.float64) for _ in range(3))
    for r, t in enumerate(rows):
        q = torch.softmax(data.logits_TV[t, : case.vocab].double() / case.distill_temperature, 0)
        if case.target == "topk":
            keep = (data.topk.ids_TK[r] >= 0) & (data.topk.logprobs_TK[r] > -math.inf)
            ids, p = data.topk.ids_TK[r][keep], torch.softmax(data.topk.logprobs_TK[r][keep].double(), 0)
        else:
            ids = torch.arange(case.vocab)
            p = torch.softmax(data.teacher_RV[r, : case.vocab].double() / case.distill_temperature, 0)
        if len(ids):
            first = ids[p.argmax()] if case.target == "topk" else p == p.max()  # a full target's ties share
            mass[t], covered[t], top[t] = q[ids].sum(), torch.minimum(p, q[ids]).sum(), q[first].mean()
    return {"student_mass_T": mass, "covered_mass_T": covered, "teacher_top_T": top}


def assert_agrees(case: Case, got: list[dict[str, Tensor]], want: dict[str, Tensor], rounding: float = 2.0**-8) -> None:
    """Compare every output on every rank, and the joined gradient of all shards, element by element.

    rounding: relative, of a bfloat16 gradient: half a unit in the last place.
    """
    eps = 1e-10 if case.dtype == "float64" else 2e-5
    for rank, one in enumerate(got):
        for name, value in want.items():
            if name == "gradient":
                continue
            room = eps * (1.0 + value.abs().max().item() if value.numel() else 1.0)
            worst = (one[name].double() - value).abs().max().item() if value.numel() else 0.0
            assert worst <= room, f"{name} on rank {rank}: off by {worst}, allowed {room}, for {case}"
    gradient, wanted = torch.cat([one["gradient"] for one in got], dim=-1), want["gradient"]
    assert gradient.dtype == DTYPES[case.dtype]
    assert not gradient[:, case.vocab :].any(), f"padding has a gradient, for {case}"
    room_TV = eps * (1.0 + wanted.abs().amax(-1, keepdim=True) if wanted.numel() else 1.0)
    if case.dtype == "bfloat16":
        room_TV = room_TV + wanted.abs() * rounding
    wrong = (gradient.double() - wanted).abs() > room_TV
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} gradients differ, for {case}"


def has_meaning(kind: str, beta: float, tail: str, clip: float | None) -> bool:
    try:
        DivergenceSpec(kind, beta, tail, clip).check_topk()
    except ValueError:
        return False
    return True


KINDS = ("jsd", "forward_kl", "reverse_kl", "skew_forward", "skew_reverse", "akl")
TAILS = ("outside", "literal", "bucket", "renormalise")


@st.composite
def cases(draw: Any, dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")) -> Case:
    """Draw any case whose options can be combined."""
    target = draw(st.sampled_from(["topk", "topk", "full", "hidden"]))
    options = draw(
        st.tuples(
            st.sampled_from(KINDS),
            st.sampled_from([0.0, 0.1, 0.5, 0.5, 0.9, 1.0]),
            st.sampled_from(TAILS),
            st.sampled_from([None, None, 0.05]),
        ).filter(lambda o: target != "topk" or has_meaning(*o))
    )
    return Case(
        *options,
        target,
        dtype=draw(st.sampled_from(dtypes)),
        tokens=draw(st.integers(0, 6)),
        width=draw(st.integers(2, 9)),
        padding=draw(st.sampled_from([0, 1, 3, 4])),
        k=draw(st.sampled_from([1, 3, 8, 64])),
        subset=draw(st.booleans()),
        ragged=draw(st.booleans()),
        temperature=draw(st.sampled_from([1.0, 0.7])),
        distill_temperature=draw(st.sampled_from([1.0, 2.0])),
        scale=draw(st.sampled_from([0.5, 2.0, 6.0])),
        inplace=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )
