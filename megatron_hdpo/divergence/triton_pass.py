"""The top-k pass on Triton kernels: the same results as TopKPass.

    forward_kernel  one read of the logits -> row statistics, sampled and support logits of this shard; on one rank also
                    everything that finish_kernel computes
                    (over several ranks: the same two all-reduces as TopKPass)
    finish_kernel   O(T k): log-prob, entropy, divergence, its gradient on the support
    gradient_kernel one read and one write of the logits

TopKPass remains the reference, and handles what the kernels do not: float64, AKL, columns that are not adjacent in
memory.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron_hdpo.divergence.options import Options, Outputs, Upstream, gradient_storage
from megatron_hdpo.divergence.shard import VocabShard
from megatron_hdpo.divergence.targets import TopK
from megatron_hdpo.divergence.topk_terms import TAIL_FLOOR


def suits(logits_TV: Tensor, target: TopK | None, options: Options) -> bool:
    """Return whether the kernels can run this pass: on CUDA (or Triton's interpreter), float32 or narrower, not AKL."""
    if logits_TV.dtype == torch.float64 or logits_TV.stride(-1) != 1 or not logits_TV.shape[0]:
        return False
    if target is not None and (options.spec.base == "akl" or target.ids_TK.shape[-1] > 1024):
        return False
    here = logits_TV.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return here and importlib.util.find_spec("triton") is not None


def launch_shape(width: int, itemsize: int) -> dict[str, int]:
    """Return how a program walks along a row: CHUNKS vectors of 128 bits a thread and turn, THREADS, and its warps.

    width: columns of the shard; itemsize: bytes of a logit. Two vectors in flight and 32 to 40 registers a thread hide
    the memory's latency; a narrow shard gets fewer threads, so that the reduction at a row's end stays small beside it.
    """
    warps = 4 if width <= 32768 else 8
    return {"CHUNKS": 2, "THREADS": 32 * warps, "VECTOR": 16 // itemsize, "num_warps": warps}


@dataclass(frozen=True)
class _Sums:
    """Float32 sums over the rows [T], and the logits at sampled and support ids, of this shard or of the whole group.

    ref_T: the largest logit x rate, where rate = log2(e) / temperature; sum_T: of e = 2^(z rate - ref); energy_T: of e
    times its exponent; other_T: as sum_T at the distillation's temperature; rest_T: as that, without the support.
    Without a target the support's buffer has one element and is not used.
    """

    ref_T: Tensor
    sum_T: Tensor
    energy_T: Tensor
    other_T: Tensor
    sampled_T: Tensor
    support_RK: Tensor
    rest_T: Tensor

    @classmethod
    def empty(cls, tokens: int, target: TopK | None, device: torch.device) -> _Sums:
        """Allocate the buffers."""
        names = ("ref_T", "sum_T", "energy_T", "other_T", "sampled_T", "rest_T")
        rows = torch.empty((len(names), tokens), dtype=torch.float32, device=device).unbind(0)
        shape = (1, 1) if target is None else target.ids_TK.shape
        support_RK = torch.empty(shape, dtype=torch.float32, device=device)
        return cls(support_RK=support_RK, **dict(zip(names, rows, strict=True)))


@dataclass(frozen=True)
class _Finished:
    """Results of the forward pass: [T] each (0 for tokens without target), and the gradient on the support [R, K]."""

    entropy_T: Tensor
    logprob_T: Tensor
    value_T: Tensor
    mass_T: Tensor
    covered_T: Tensor
    top_T: Tensor
    grad_RK: Tensor
    outside_T: Tensor

    @classmethod
    def empty(cls, sums: _Sums) -> _Finished:
        """Allocate the buffers."""
        like = {f.name: sums.support_RK if f.name == "grad_RK" else sums.ref_T for f in fields(cls)}
        return cls(**{name: torch.empty_like(tensor) for name, tensor in like.items()})


@dataclass(frozen=True)
class _Modes:
    """Compile-time choices of the kernels."""

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


def _descending(ids_RK: Tensor, shard: VocabShard) -> Tensor:
    """Return the local columns of a support in this shard, int32 [R, K], in descending order; -1 for all other ids."""
    local_RK = ids_RK - shard.start
    absent_RK = (local_RK < 0) | (local_RK >= shard.valid)
    return local_RK.masked_fill(absent_RK, -1).to(torch.int32).sort(dim=-1, descending=True).values


def _rates(options: Options) -> tuple[float, float, float]:
    """Return log2(e) / temperature for sampling and distillation, and the second one relative to the first."""
    t_s, t_d = options.temperature, options.distill_temperature
    return math.log2(math.e) / t_s, math.log2(math.e) / t_d, t_s / t_d


@dataclass(frozen=True)
class _Launch:
    """Arguments that the forward's kernels have in common, in their order."""

    tensors: tuple[Tensor, ...]
    scalars: tuple[float, ...]
    flags: dict[str, Any]


def _launch(ids_T: Tensor, row_T: Tensor, target: TopK | None, options: Options) -> _Launch:
    from megatron_hdpo.divergence.triton_terms import KIND_CODES, TAIL_CODES

    modes, spec = _Modes.of(target, options), options.spec
    ids_RK, logprobs_RK = (ids_T, ids_T) if target is None else (target.ids_TK, target.logprobs_TK)
    k = 1 if target is None else ids_RK.shape[-1]
    outside = spec.outside_constant if target is not None else 0.0
    return _Launch(
        (ids_T, row_T, ids_RK, logprobs_RK),
        (*_rates(options), spec.beta, outside, spec.clip or 0.0, options.shard.vocab_size, TAIL_FLOOR, k),
        dict(
            ENTROPY=modes.entropy, TWO=modes.two, TARGET=modes.target, REST=modes.rest,
            KIND=KIND_CODES.get(spec.base, 0), TAIL=TAIL_CODES[spec.tail], CLIP=spec.clip is not None, K=_padded(k),
        ),
    )  # fmt: skip


def _forward(logits_TV: Tensor, launch: _Launch, target: TopK | None, options: Options) -> tuple[_Sums, _Finished]:
    """Run the forward pass, in one launch if no other rank's sums are needed and a row's support fits one program."""
    from megatron_hdpo.divergence.triton_kernels import finish_kernel, forward_kernel

    shard, modes, tokens = options.shard, _Modes.of(target, options), logits_TV.shape[0]
    sums = _Sums.empty(tokens, target, logits_TV.device)
    done = _Finished.empty(sums)
    holes_RK = _descending(target.ids_TK, shard) if target is not None and modes.rest else launch.tensors[1]
    at_once = shard.size == 1 and launch.flags["K"] <= 256
    forward_kernel[(tokens,)](
        logits_TV, logits_TV.stride(0), *launch.tensors, holes_RK, *_tensors(sums), *_tensors(done),
        shard.start, shard.valid, *launch.scalars,
        FINISH=at_once, **launch.flags, **launch_shape(shard.width, logits_TV.itemsize),
    )  # fmt: skip
    if at_once:
        return sums, done
    sums = _join(sums, options, modes)
    finish_kernel[(tokens,)](
        *launch.tensors, *_tensors(sums), *_tensors(done), *launch.scalars,
        **launch.flags, num_warps=max(1, min(4, launch.flags["K"] // 32)),
    )  # fmt: skip
    return sums, done


def _tensors(buffers: _Sums | _Finished) -> tuple[Tensor, ...]:
    return tuple(getattr(buffers, f.name) for f in fields(buffers))


def _exp2(exponents: Tensor) -> Tensor:
    """Return 2^exponents. On CUDA, torch.exp2 is compiled in the process that calls it first; torch.exp is there."""
    return (exponents * math.log(2.0)).exp()


def _join(local: _Sums, options: Options, modes: _Modes) -> _Sums:
    """Join the ranks' sums, relative to the group's largest reference, by two all-reduces."""
    if options.shard.size == 1:
        return local
    shard, ratio = options.shard, _rates(options)[2]
    ref_T = shard.all_reduce_max_(local.ref_T.clone())
    gap_T = local.ref_T - ref_T
    scale_T = _exp2(gap_T)
    scale_d_T = _exp2(local.ref_T * ratio - ref_T * ratio) if modes.two else scale_T
    sums = {"sampled_T": local.sampled_T, "sum_T": local.sum_T * scale_T}
    if modes.two:
        sums["other_T"] = local.other_T * scale_d_T
    if modes.target:
        sums["support_RK"] = local.support_RK
    if modes.entropy:
        sums["energy_T"] = (local.energy_T + local.sum_T * gap_T) * scale_T
    if modes.rest:
        sums["rest_T"] = local.rest_T * scale_d_T
    total: dict[str, Any] = dict(zip(sums, shard.all_reduce_sum(list(sums.values())), strict=True))
    return replace(local, ref_T=ref_T, **total)


@dataclass(frozen=True)
class TritonPass:
    """A finished pass on the kernels, with or without a top-k target; see options.Pass."""

    outputs: Outputs
    options: Options
    target: TopK | None
    ids_T: Tensor
    row_T: Tensor
    sums: _Sums
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
        sums, done = _forward(logits_TV, _launch(ids_T, row_T, target, options), target, options)
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
            self.sums.support_RK, *given, self.sums.ref_T, self.sums.sum_T, self.sums.other_T, done.entropy_T,
            done.logprob_T, self.sums.sampled_T, done.grad_RK, done.outside_T,
            shard.start, shard.valid, shard.width, *_rates(options), k,
            LOGPROB=upstream.logprobs_T is not None, ENTROPY=upstream.entropy_T is not None,
            TARGET=distills, TWO=modes.two, K=_padded(k), **launch_shape(shard.width, logits_TV.itemsize),
        )  # fmt: skip
        return grad_TV
