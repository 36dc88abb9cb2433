"""The top-k pass on Triton kernels: the same results as TopKPass, in two kernels forward and one backward.

    stats_kernel    one read of the logits -> row statistics, sampled and support logits of this shard
                    (over several ranks: the same two all-reduces as TopKPass)
    finish_kernel   O(T k): normalisers, log-prob, entropy, divergence, its gradient on the support
    gradient_kernel one read and one write of the logits

TopKPass remains the reference, and handles what the kernels do not: float64, AKL, columns that are not adjacent in
memory.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron_hdpo.divergence.options import Options, Outputs, Upstream, gradient_storage
from megatron_hdpo.divergence.row_stats import RowStats, shift_stats
from megatron_hdpo.divergence.targets import TopK
from megatron_hdpo.divergence.topk_terms import TAIL_FLOOR


def suits(logits_TV: Tensor, target: TopK | None, options: Options) -> bool:
    """Return whether the kernels can run this pass: on CUDA (or Triton's interpreter), float32 or narrower, not AKL."""
    if logits_TV.dtype == torch.float64 or logits_TV.stride(-1) != 1 or not logits_TV.shape[0]:
        return False
    if target is not None and (options.spec.base == "akl" or target.ids_TK.shape[-1] > 1024 or not len(target.ids_TK)):
        return False
    here = logits_TV.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return here and importlib.util.find_spec("triton") is not None


def block_and_warps(width: int) -> dict[str, int]:
    """Return the columns that a program reads at a time and its warps; more columns per thread spill registers."""
    block = min(8192, max(128, 1 << (width - 1).bit_length()))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}


@dataclass(frozen=True)
class _Buffers:
    """Float32 buffers of the kernels; without a target the support's buffer has one element and is not used."""

    max_T: Tensor
    sum_T: Tensor
    energy_T: Tensor
    other_T: Tensor
    sampled_T: Tensor
    support_RK: Tensor
    rest_T: Tensor

    @classmethod
    def empty(cls, tokens: int, target: TopK | None, device: torch.device) -> _Buffers:
        """Allocate the buffers."""
        names = ("max_T", "sum_T", "energy_T", "other_T", "sampled_T", "rest_T")
        rows = torch.empty((len(names), tokens), dtype=torch.float32, device=device).unbind(0)
        shape = (1, 1) if target is None else target.ids_TK.shape
        support_RK = torch.empty(shape, dtype=torch.float32, device=device)
        return cls(support_RK=support_RK, **dict(zip(names, rows, strict=True)))


@dataclass(frozen=True)
class _Modes:
    """Compile-time choices of the three kernels."""

    entropy: bool
    two: bool
    target: bool
    rest: bool

    @classmethod
    def of(cls, target: TopK | None, options: Options) -> _Modes:
        """Derive the choices from target and options."""
        two = target is not None and options.temperature != options.distill_temperature
        return cls(options.entropy, two, target is not None, target is not None and options.spec.tail == "bucket")


def _row_of_token(target: TopK | None, tokens: int, device: torch.device) -> Tensor:
    """Return the target row of each token, int32 [T], -1 for tokens without target."""
    if target is None:
        return torch.empty(1, dtype=torch.int32, device=device)
    if target.rows is None:
        return torch.arange(tokens, dtype=torch.int32, device=device)
    row_T = torch.full((tokens,), -1, dtype=torch.int32, device=device)
    row_T[target.rows] = torch.arange(len(target.rows), dtype=torch.int32, device=device)
    return row_T


def _padded(k: int) -> int:
    return 1 << (k - 1).bit_length()


def _run_stats(logits_TV: Tensor, ids_T: Tensor, row_T: Tensor, target: TopK | None, options: Options) -> _Buffers:
    from megatron_hdpo.divergence.triton_kernels import stats_kernel

    shard, modes, tokens = options.shard, _Modes.of(target, options), logits_TV.shape[0]
    out = _Buffers.empty(tokens, target, logits_TV.device)
    ids_RK = ids_T if target is None else target.ids_TK
    sorted_RK = ids_RK
    if modes.rest:
        sorted_RK = ids_RK.masked_fill(ids_RK < shard.start, 2147483647).sort(dim=-1).values.to(torch.int32)
    k = 1 if target is None else ids_RK.shape[-1]
    stats_kernel[(tokens,)](
        logits_TV, logits_TV.stride(0), ids_T, row_T, ids_RK, sorted_RK,
        out.max_T, out.sum_T, out.energy_T, out.other_T, out.sampled_T, out.support_RK, out.rest_T,
        shard.start, shard.valid, 1.0 / options.temperature, 1.0 / options.distill_temperature, k,
        ENTROPY=modes.entropy, TWO=modes.two, TARGET=modes.target, REST=modes.rest,
        K=_padded(k), **block_and_warps(shard.width),
    )  # fmt: skip
    return out


def _join(local: _Buffers, options: Options, modes: _Modes) -> _Buffers:
    """Join the ranks' sums, relative to the group's maximum, by two all-reduces."""
    if options.shard.size == 1:
        return local
    shard, t_s, t_d = options.shard, options.temperature, options.distill_temperature
    max_T = shard.all_reduce_max_(local.max_T.clone())
    rest_T = local.rest_T if modes.rest else None
    energy_T = local.energy_T if modes.entropy else None
    sums = {"sampled_T": local.sampled_T}
    if modes.two:
        sums["sum_T"] = shift_stats(RowStats(local.max_T, local.sum_T, energy_T, None), max_T, t_s).sum_T
        sums["other_T"] = shift_stats(RowStats(local.max_T, local.other_T, None, rest_T), max_T, t_d).sum_T
    else:
        sums["sum_T"] = shift_stats(RowStats(local.max_T, local.sum_T, energy_T, rest_T), max_T, t_s).sum_T
    if modes.target:
        sums["support_RK"] = local.support_RK
    if energy_T is not None:
        sums["energy_T"] = energy_T
    if rest_T is not None:
        sums["rest_T"] = rest_T
    total: dict[str, Any] = dict(zip(sums, shard.all_reduce_sum(list(sums.values())), strict=True))
    return replace(local, max_T=max_T, **total)


@dataclass(frozen=True)
class _Finished:
    """Outputs of finish_kernel: [T] each (0 for tokens without target), and the gradient on the support [R, K]."""

    lse_T: Tensor
    lse_distill_T: Tensor
    entropy_T: Tensor
    logprob_T: Tensor
    value_T: Tensor
    mass_T: Tensor
    covered_T: Tensor
    top_T: Tensor
    grad_RK: Tensor
    outside_T: Tensor


def _finish(sums: _Buffers, ids_T: Tensor, row_T: Tensor, target: TopK | None, options: Options) -> _Finished:
    from megatron_hdpo.divergence.triton_kernels import KIND_CODES, TAIL_CODES, finish_kernel

    modes, spec, tokens = _Modes.of(target, options), options.spec, ids_T.shape[0]
    like = {f.name: sums.support_RK if f.name == "grad_RK" else sums.max_T for f in fields(_Finished)}
    out = _Finished(**{name: torch.empty_like(tensor) for name, tensor in like.items()})
    ids_RK, logprobs_RK = (ids_T, sums.sum_T) if target is None else (target.ids_TK, target.logprobs_TK)
    k = 1 if target is None else ids_RK.shape[-1]
    finish_kernel[(tokens,)](
        row_T, ids_T, ids_RK, logprobs_RK,
        sums.max_T, sums.sum_T, sums.energy_T, sums.other_T, sums.sampled_T, sums.support_RK, sums.rest_T,
        out.lse_T, out.lse_distill_T, out.entropy_T, out.logprob_T, out.value_T, out.mass_T, out.covered_T, out.top_T,
        out.grad_RK, out.outside_T,
        1.0 / options.temperature, 1.0 / options.distill_temperature,
        spec.beta, spec.outside_constant if target is not None else 0.0, spec.clip or 0.0,
        options.shard.vocab_size, TAIL_FLOOR, k,
        ENTROPY=modes.entropy, TWO=modes.two, TARGET=modes.target,
        KIND=KIND_CODES.get(spec.base, 0), TAIL=TAIL_CODES[spec.tail], CLIP=spec.clip is not None,
        K=_padded(k), num_warps=max(1, min(4, _padded(k) // 32)),
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class TritonPass:
    """A finished pass on the kernels, with or without a top-k target; see options.Pass."""

    outputs: Outputs
    options: Options
    target: TopK | None
    ids_T: Tensor
    row_T: Tensor
    sums: _Buffers
    done: _Finished

    @classmethod
    def run(cls, logits_TV: Tensor, ids_T: Tensor | None, target: TopK | None, options: Options) -> TritonPass:
        """Run the forward pass, with the arguments of TopKPass.run; `suits` must hold."""
        if ids_T is None:
            ids_T = torch.full(logits_TV.shape[:1], -1, device=logits_TV.device)
        if target is not None:
            target = target.pruned()
            target = TopK(target.ids_TK.contiguous(), target.logprobs_TK.contiguous(), target.rows)
        row_T = _row_of_token(target, logits_TV.shape[0], logits_TV.device)
        sums = _join(_run_stats(logits_TV, ids_T, row_T, target, options), options, _Modes.of(target, options))
        done = _finish(sums, ids_T, row_T, target, options)
        shown_T = done.logprob_T.detach() if options.logprobs else None
        entropy_T = done.entropy_T.detach() if options.entropy else None
        outputs = Outputs(shown_T, entropy_T, None)
        if target is not None:
            parts = done.value_T, done.mass_T, done.covered_T, done.top_T
            outputs = Outputs(shown_T, entropy_T, *(part.detach() for part in parts))
        return cls(outputs=outputs, options=options, target=target, ids_T=ids_T, row_T=row_T, sums=sums, done=done)

    def without_outputs(self) -> TritonPass:
        """Return the pass without its outputs; see options.Pass."""
        return replace(self, outputs=Outputs.none())

    def gradient(self, logits_TV: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        """Compute the gradient to the logits; see options.Pass."""
        from megatron_hdpo.divergence.triton_kernels import gradient_kernel

        shard, options, done, target = self.options.shard, self.options, self.done, self.target
        grad_TV = gradient_storage(logits_TV, inplace)
        # The kernel's writes are invisible to autograd, which must notice a second use of the logits.
        torch.autograd.graph.increment_version(grad_TV)
        distills = target is not None and upstream.divergence_T is not None
        modes = _Modes.of(target if distills else None, options)
        ids_RK = self.ids_T if target is None else target.ids_TK
        ups = [upstream.logprobs_T, upstream.entropy_T, upstream.divergence_T]
        given = [self.sums.sum_T if up is None else up.contiguous() for up in ups]
        k = 1 if target is None else ids_RK.shape[-1]
        gradient_kernel[(logits_TV.shape[0],)](
            logits_TV, logits_TV.stride(0), grad_TV, grad_TV.stride(0), self.ids_T, self.row_T, ids_RK,
            self.sums.support_RK, *given, done.lse_T, done.lse_distill_T, done.entropy_T, done.logprob_T,
            self.sums.sampled_T, done.grad_RK, done.outside_T,
            shard.start, shard.valid, shard.width, 1.0 / options.temperature, 1.0 / options.distill_temperature, k,
            LOGPROB=upstream.logprobs_T is not None, ENTROPY=upstream.entropy_T is not None,
            TARGET=distills, TWO=modes.two, K=_padded(k), **block_and_warps(shard.width),
        )  # fmt: skip
        return grad_TV
