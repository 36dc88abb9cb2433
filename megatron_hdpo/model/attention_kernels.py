"""Causal attention on torch's kernels, and which of them it takes.

On Hopper, torch sends scaled_dot_product_attention to cuDNN, which builds a plan for every new shape (some 0.4 s each);
the shapes here are lengths of sequences, and hardly one comes twice. So cuDNN is left out. In half precision all
segments go through flash attention in one call, which needs no mask: its causality is that of a segment, with the
queries as the last rows. Without a kernel for that (a CPU, float32) each segment is a call of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from megatron_hdpo.model.segments import Segments

# Before torch 2.12 there is no such argument, and fewer heads of keys are always allowed.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
_CAUSAL = (-1, 0)


def attend(query_MHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, segments: Segments, scale: float | None) -> Tensor:
    """Attend causally within each segment: [M, heads, d] for M rows of queries.

    key_NGD, value_NGD: rows of the segments' keys, back to back; each of the G heads serves H / G heads of queries.
    """
    if takes_flash(query_MHD):
        lengths = segments.cu_queries, segments.cu_keys, max(segments.queries), max(segments.keys)
        output = varlen_attn(query_MHD, key_NGD, value_NGD, *lengths, scale=scale, window_size=_CAUSAL, **_GROUPED)
        return cast(Tensor, output)
    parts = zip(
        query_MHD.split(segments.queries), key_NGD.split(segments.keys), value_NGD.split(segments.keys), strict=True
    )
    outputs = [
        attend_causally(*(x.transpose(0, 1)[None] for x in part), scale=scale)[0].transpose(0, 1) for part in parts
    ]
    return torch.cat(outputs)


def takes_flash(query: Tensor) -> bool:
    """Return whether torch's flash attention takes these queries [..., d]: half precision on an Ampere or newer GPU."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    head_dim = query.shape[-1]
    return head_dim % 8 == 0 and head_dim <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def attend_causally(query_BHSD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, *, scale: float | None) -> Tensor:
    """Attend causally, [B, heads, S, d]; the S queries are the last of the T rows of keys."""
    queries, keys = query_BHSD.shape[2], key_BGTD.shape[2]
    mask = None
    if queries < keys:  # torch's is_causal assumes that the queries are the first rows of the sequence
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query_BHSD.device).tril(keys - queries)
    if query_BHSD.is_cuda:  # of the fused kernels, only flash attention takes fewer heads of keys
        repeats = query_BHSD.shape[1] // key_BGTD.shape[1]
        key_BGTD, value_BGTD = (x.repeat_interleave(repeats, dim=1) for x in (key_BGTD, value_BGTD))
    with without_cudnn(query_BHSD.device):
        return F.scaled_dot_product_attention(
            query_BHSD,
            key_BGTD,
            value_BGTD,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=not query_BHSD.is_cuda,
            scale=scale,
        )


@contextmanager
def without_cudnn(device: torch.device) -> Iterator[None]:
    """Leave cuDNN out of the kernels that scaled_dot_product_attention chooses from; on a CPU there is none of it."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield
