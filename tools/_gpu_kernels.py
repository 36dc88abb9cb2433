"""Kernels that only a GPU runs, against float64 on the host: what the CPU's tests cannot show.

Each setting returns the largest relative difference of its outputs and gradients, and raises ValueError where that is
more than rounding explains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_hdpo.divergence import TopK, head_loss
from megatron_hdpo.divergence.head_run import Chunk
from megatron_hdpo.divergence.losses import Losses
from megatron_hdpo.model.attention_kernels import attend
from megatron_hdpo.model.segments import own_rows, shared_sequences, whole_sequences
from megatron_hdpo.rollout.sglang.weights.word_digests import WordDigests

LIMITS = {torch.bfloat16: 0.02, torch.float32: 1e-4}
"""Largest relative difference that rounding explains, with room for another order of summation."""
HEADS, GROUPS = 8, 2
DIGEST_OF_COUNTING = "e50393a4d36e4a4f"
"""Digest of the bytes 0, 1, ..., 255, 0, 1, ... of 300,000 bytes, as SGLang 0.5.23 defines it."""


def settings(device: str) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """Return what to compare, by name."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for dtype in LIMITS:
        kind = str(dtype).removeprefix("torch.")
        for width in (64, 128):
            found[f"attention, {kind}, heads of {width}"] = partial(attention, device, dtype, width, 1, 0)
        for rank in (0, 1):
            found[f"attention, {kind}, rank {rank} of 2"] = partial(attention, device, dtype, 64, 2, rank)
        found[f"head, {kind}"] = partial(head, device, dtype)
    return found | {"digest": partial(digest, device)}


def attention(device: str, dtype: torch.dtype, width: int, ranks: int, rank: int) -> dict[str, Any]:
    """Compare attention over packed sequences, or over a context-parallel rank's part of them."""
    # Rows where sequences begin: multiples of the four chunks of two ranks. On a CPU only this script is tested.
    bounds = np.array([0, 64, 72, 1096, 1600] if device == "cuda" else [0, 64, 72, 112, 160])
    gen, rows = torch.Generator().manual_seed(0), int(bounds[-1])
    query, key, value = (torch.randn(rows, heads, width, generator=gen) for heads in (HEADS, GROUPS, GROUPS))
    own = torch.from_numpy(own_rows(bounds, ranks, rank))
    grad = torch.randn(len(own), HEADS, width, generator=gen)

    def run(where: torch.device, precision: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(dtype).to(where, precision).requires_grad_() for x in (query, key, value))
        if ranks == 1:
            on_device = torch.from_numpy(bounds).to(where, torch.int32)
            out = attend(q, k, v, whole_sequences(bounds, on_device), None)
        else:
            segments = shared_sequences(bounds, ranks, rank, where)
            # `key_rows` counts the rows of rank after rank.
            of_ranks = np.concatenate([own_rows(bounds, ranks, other) for other in range(ranks)])
            gathered = [x[torch.from_numpy(of_ranks).to(where)].index_select(0, segments.key_rows) for x in (k, v)]
            out = attend(q[own.to(where)], *gathered, segments, None)
        out.backward(grad.to(dtype).to(where, precision))
        return [out.detach(), *(x.grad for x in (q, k, v))]

    return _compared(run, device, dtype)


def head(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Compare log-probs, entropy and top-k divergence of the chunked head, and its gradients."""
    gen, hidden, k = torch.Generator().manual_seed(0), 256, 64
    tokens, vocab = (512, 40_000) if device == "cuda" else (64, 500)
    states, weight = (torch.randn(n, hidden, generator=gen) for n in (tokens, vocab))
    sampled = torch.randint(0, vocab, (tokens,), generator=gen)
    ids = torch.stack([torch.randperm(vocab, generator=gen)[:k] for _ in range(tokens // 2)])
    logprobs = torch.randn(tokens // 2, k, generator=gen).log_softmax(-1) - 0.1
    rows = torch.arange(0, tokens, 2)

    def objective(losses: Losses, chunk: Chunk) -> Tensor:
        assert losses.divergence_T is not None and losses.entropy_T is not None
        return losses.logprobs_T.sum() + losses.divergence_T.sum() + 0.1 * losses.entropy_T.sum()

    def run(where: torch.device, precision: torch.dtype) -> list[Tensor]:
        h, w = ((x / hidden**0.25).to(dtype).to(where, precision).requires_grad_() for x in (states, weight))
        target = TopK(ids.to(where), logprobs.to(where), rows)
        loss, losses = head_loss(h, w, sampled.to(where), objective, target, chunk=tokens // 4)
        loss.backward()
        assert losses.divergence_T is not None
        return [losses.logprobs_T.detach(), losses.divergence_T.detach(), h.grad, w.grad]

    return _compared(run, device, dtype)


def digest(device: str) -> dict[str, Any]:
    """Compare the checksum of weights with a recorded one."""
    if device != "cuda":
        return {"refused": "the checksum of servers on GPUs is computed on a GPU"}
    digests = WordDigests()
    digests.append((0, "w"), torch.arange(300_000, device=device).to(torch.uint8))
    found = digests.result()[0, "w"]
    if found != DIGEST_OF_COUNTING:
        raise ValueError(f"the digest is {found}, not {DIGEST_OF_COUNTING}")
    return {"digest": found}


def _compared(run: Callable[[torch.device, torch.dtype], list[Any]], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Run on the device in its dtype and on the host in float64; raise ValueError where they are too far apart."""
    expected = run(torch.device("cpu"), torch.float64)
    found = [tensor.double().cpu() for tensor in run(torch.device(device), dtype)]
    apart = max(_apart(found, expected))
    if not apart <= LIMITS[dtype]:
        raise ValueError(f"values differ by {apart:.2g} from float64's, {LIMITS[dtype]:g} is the limit")
    return {"largest_difference": apart}


def _apart(found: Iterable[Tensor], expected: Iterable[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
