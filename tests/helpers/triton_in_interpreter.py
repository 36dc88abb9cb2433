"""Run in a process of its own with TRITON_INTERPRET=1: the kernels against the definitions and the torch path."""

from __future__ import annotations

import itertools
import os
import socket

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from divergence_cases import KINDS, TAILS, Case, assert_agrees, build, engine, has_meaning, reference
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from megatron_hdpo.divergence import DivergenceSpec, TopK, logit_losses, triton_pass

TRUNCATION = 2.0**-7  # the interpreter cuts float32 off to bfloat16 where a GPU rounds


def fused_multiply_add(self, x, y, z):
    """A GPU rounds once, the interpreter twice."""
    return TensorHandle((x.data.astype(np.float64) * y.data + z.data).astype(np.float32), z.dtype.scalar)


InterpreterBuilder.create_fma = fused_multiply_add
calls = 0
original = triton_pass.TritonPass.run.__func__


def counted(cls, *arguments):
    global calls
    calls += 1
    return original(cls, *arguments)


triton_pass.TritonPass.run = classmethod(counted)


def main() -> None:
    ran = 0
    for kind, tail, dtype, clip in itertools.product(KINDS, TAILS, ("float32", "bfloat16"), (None, 0.05)):
        if kind == "akl" or not has_meaning(kind, 0.5, tail, clip):
            continue
        for seed in [0] if clip else range(3) if dtype == "float32" else [1]:
            case = Case(
                kind, (0.5, 0.2, 0.5)[seed] if tail != "literal" else 0.5, tail, clip, "topk", dtype,
                width=(8, 50, 2)[seed], k=(5, 64, 1)[seed], subset=seed != 1, ragged=seed == 1, seed=seed,
                temperature=(0.7, 1.0, 1.0)[seed], distill_temperature=(1.0, 1.0, 2.0)[seed], inplace=seed != 2,
            )  # fmt: skip
            before = calls
            assert_agrees(case, [engine(case, None, 0, 1)], reference(case), TRUNCATION)
            expected = clip is None or tail != "outside" or kind in ("forward_kl", "skew_forward")
            assert (calls > before) == expected, f"the kernels were {'not ' if expected else ''}used for {case}"
            ran += 1
    only_parts_of_the_objective()
    extremes()
    many_support_entries()
    a_target_of_no_token()
    two_ranks()
    print(f"{ran} cases, {calls} on the kernels")


def one_rank(rank: int, port: int) -> None:
    """Two shards on the kernels: offsets, sums over ranks, a whole shard of padding."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"tcp://127.0.0.1:{port}")
    variants = ("outside", 3, True), ("bucket", 3, False), ("bucket", 17, False), ("renormalise", 3, False)
    for tail, padding, ragged in variants:
        case = Case(
            "jsd", 0.5, tail, None, "topk", "float32", k=6, padding=padding, ragged=ragged,
            temperature=0.7, distill_temperature=1.0 if padding == 3 else 0.7, subset=True,
        )  # fmt: skip
        before, answers = calls, [None, None]
        dist.all_gather_object(answers, engine(case, dist.group.WORLD, rank, 2))
        assert calls > before, "the kernels were not used"
        assert_agrees(case, answers, reference(case))
    os._exit(0)


def two_ranks() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(one_rank, (port,), 2)


def only_parts_of_the_objective() -> None:
    """Upstream gradients for one output at a time, no target, rows longer than a block."""
    case = Case("jsd", 0.5, "bucket", None, "topk", "float32", tokens=3, width=3000, k=7, temperature=0.7)
    data = build(case)
    for target, part in itertools.product((data.topk, None), range(3)):
        results = []
        for dtype in (torch.float32, torch.float64):
            z = data.logits_TV.detach().clone().to(dtype).requires_grad_()
            spec = DivergenceSpec(tail="bucket")
            losses = logit_losses(z, data.ids_T, target, spec=spec, temperature=0.7, vocab_size=case.vocab)
            out = [losses.logprobs_T, losses.entropy_T, losses.divergence_T][part]
            if out is not None:
                (out * data.upstream_3T[part]).sum().backward()
                results.append((out.detach(), z.grad))
        if results:
            for low, high in zip(*results, strict=True):
                torch.testing.assert_close(low.double(), high, rtol=2e-5, atol=2e-5)


def rows_of_extremes() -> torch.Tensor:
    """Logits [8, 5000]: several blocks, and a ragged one."""
    gen = torch.Generator().manual_seed(3)
    usual = 2 * torch.randn(8, 5000, generator=gen)
    usual[1] = 0.0  # all equal
    usual[2] = -7e3
    usual[3] += 1e4  # exponents of 14,427: a product that is rounded before the subtraction is off by a thousandth
    usual[4] *= 5e3  # one token has all the mass
    usual[5, 1::2] = -torch.inf
    usual[5, 512:1536] = -torch.inf  # whole vectors of a thread
    usual[6, 1:] = -torch.inf
    usual[7] -= torch.linspace(0, 3e3, 5000)  # the first block that is read is far below the maximum
    return usual


def extremes() -> None:
    """Every row against float64, at two temperatures; and a logit that is no number makes results that are none."""
    for dtype, (t_s, t_d) in itertools.product((torch.float32, torch.bfloat16), ((1.0, 1.0), (0.7, 1.3))):
        logits = rows_of_extremes().to(dtype)
        ids = torch.zeros(8, dtype=torch.int64)
        # The references' -inf is finite: its probability is 0, and 0 times it is 0.
        z = logits.double().clamp_min(-1e6).requires_grad_()
        lq = (z / t_s).log_softmax(-1)
        wanted = [lq[:, 0], -(lq.exp() * lq).sum(-1)]
        target = TopK(torch.arange(4).repeat(8, 1), torch.full((8, 4), 0.2).log())
        at_target = (z / t_d).log_softmax(-1)[:, :4]
        wanted += [(0.25 * (np.log(0.25) - at_target)).sum(-1).where(torch.arange(8) < 5, 0.0)]
        target = TopK(target.ids_TK[:5], target.logprobs_TK[:5], torch.arange(5))
        torch.stack(wanted).sum().backward()
        leaf = logits.clone().requires_grad_()
        spec = DivergenceSpec("forward_kl")
        losses = logit_losses(leaf, ids, target, spec=spec, temperature=t_s, distill_temperature=t_d)
        got = [losses.logprobs_T, losses.entropy_T, losses.divergence_T]
        torch.stack(got).sum().backward()
        for one, want in zip(got, wanted, strict=True):
            torch.testing.assert_close(one.double(), want, rtol=1e-5, atol=1e-5)
        rounding = 1e-5 if dtype == torch.float32 else TRUNCATION
        torch.testing.assert_close(leaf.grad.double(), z.grad, rtol=rounding, atol=1e-5)
    broken = rows_of_extremes()[:1]
    broken[0, 4321] = torch.nan
    losses = logit_losses(broken, torch.zeros(1, dtype=torch.int64))
    assert losses.logprobs_T.isnan().all() and losses.entropy_T.isnan().all()


def many_support_entries() -> None:
    """A support that is too long for one launch: the separate finish on one rank."""
    case = Case("jsd", 0.5, "bucket", None, "topk", "float32", tokens=2, width=100, k=300, ragged=True)
    assert_agrees(case, [engine(case, None, 0, 1)], reference(case))


def a_target_of_no_token() -> None:
    """A chunk of a micro-batch may have no target: the torch path would make a GPU's host wait for it."""
    for tail in ("outside", "bucket"):
        results = []
        for dtype in (torch.float32, torch.float64):
            z = torch.linspace(-3, 3, 36, dtype=dtype).view(4, 9).requires_grad_()
            nothing = TopK(torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
            before = calls
            losses = logit_losses(z, torch.arange(4), nothing, spec=DivergenceSpec(tail=tail), temperature=0.7)
            assert (calls > before) == (dtype == torch.float32)
            (losses.logprobs_T - losses.entropy_T + losses.divergence_T).sum().backward()
            assert not losses.divergence_T.any() and not losses.covered_mass_T.any()
            results.append((losses.logprobs_T.detach(), losses.entropy_T.detach(), z.grad))
        for low, high in zip(*results, strict=True):
            torch.testing.assert_close(low.double(), high, rtol=2e-5, atol=2e-5)


if __name__ == "__main__":
    main()
