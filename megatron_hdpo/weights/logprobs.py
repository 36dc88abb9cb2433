"""Log-probs over the whole vocabulary, for comparisons with a reference; training never makes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.network import HeadlessGPTModel, hidden_rows
from megatron_hdpo.model.packing import PackedSequences, pack
from megatron_hdpo.parallel.context import ParallelContext


@torch.no_grad()
def packed_logprobs(
    model: HeadlessGPTModel, architecture: Architecture, context: ParallelContext, sequences: Sequence[np.ndarray]
) -> list[Tensor]:
    """log_softmax of the next token at every position: fp32 [length, vocabulary] for each sequence, on the CPU.

    The sequences go through the model as one packed row. Collective within a replica; the replica's first rank gets
    the result, the others an empty list.
    """
    packed = pack(sequences, context.device, context.layout.tensor if context.layout.sequence else 1)
    with context.megatron_calls():
        hidden = _forward(model, architecture, context, packed)
        logits = _gather_logits(model, hidden, context, packed.num_tokens) if context.is_last_stage else None
    logits = _to_first_stage(logits, architecture, context, packed.num_tokens)
    if logits is None:
        return []
    logprobs_TV = torch.log_softmax(logits[:, : architecture.vocab_size].float().cpu(), dim=-1)
    return [
        logprobs_TV[start : start + len(sequence)] for start, sequence in zip(packed.starts, sequences, strict=True)
    ]


def _forward(
    model: HeadlessGPTModel, architecture: Architecture, context: ParallelContext, packed: PackedSequences
) -> Tensor:
    """The packed row through all pipeline stages, one after the other; returns this stage's output."""
    pp = context.groups.pp
    if not context.is_first_stage:
        rows = packed.num_tokens // (context.layout.tensor if context.layout.sequence else 1)
        shape = (rows, 1, architecture.hidden_size)
        received = torch.empty(shape, dtype=model.config.pipeline_dtype, device=context.device)
        dist.recv(received, group=pp, group_src=pp.rank() - 1)
        model.set_input_tensor([received])
    hidden = model(
        input_ids=packed.tokens_T[None],
        position_ids=packed.positions_T[None],
        attention_mask=None,
        packed_seq_params=packed.packed_seq_params(),
    )
    if not context.is_last_stage:
        dist.send(hidden.contiguous(), group=pp, group_dst=pp.rank() + 1)
    return hidden


def _gather_logits(model: HeadlessGPTModel, hidden: Tensor, context: ParallelContext, rows: int) -> Tensor:
    """[rows, padded vocabulary] on every tensor-parallel rank of the last stage."""
    hidden_TH = hidden_rows(model, hidden, torch.arange(rows, device=context.device), context.groups)
    shard = torch.nn.functional.linear(hidden_TH, model.head_weight())
    shards = [torch.empty_like(shard) for _ in range(context.groups.tp.size())]
    dist.all_gather(shards, shard, group=context.groups.tp)
    return torch.cat(shards, dim=-1)


def _to_first_stage(
    logits: Tensor | None, architecture: Architecture, context: ParallelContext, rows: int
) -> Tensor | None:
    """The last stage's logits on the replica's first rank; None elsewhere."""
    pp = context.groups.pp
    if context.groups.tp.rank() != 0:
        return None
    if pp.size() == 1:
        return logits
    if logits is not None:
        dist.send(logits.float(), group=pp, group_dst=0)
    if not context.is_first_stage:
        return None
    shape = (rows, architecture.padded_vocab_size(context.layout.tensor))
    received = torch.empty(shape, dtype=torch.float32, device=context.device)
    dist.recv(received, group=pp, group_src=pp.size() - 1)
    return received
