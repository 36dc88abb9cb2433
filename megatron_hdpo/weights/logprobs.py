"""Log-probs over the whole vocabulary, for comparisons with a reference; training never computes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.chunks import chunks_of, unwrap
from megatron_hdpo.model.network import hidden_rows
from megatron_hdpo.model.packing import PackedSequences, RowLayout, pack
from megatron_hdpo.parallel.context import ParallelContext


@torch.no_grad()
def packed_logprobs(
    model: nn.Module, architecture: Architecture, context: ParallelContext, sequences: Sequence[np.ndarray]
) -> list[Tensor]:
    """Compute log_softmax of the next token at every position: fp32 [length, vocabulary] per sequence, on the CPU.

    The sequences go through the model as one packed row. Collective within a replica, and over the ranks that share
    its experts; the replica's first rank gets the result, the others an empty list.
    """
    multiple, cp = context.layout.tensor if context.layout.sequence else 1, context.groups.cp
    packed = pack(sequences, context.device, RowLayout(multiple, cp.size(), cp.rank()))
    with context.megatron_calls():
        hidden = _forward(model, architecture, context, packed)
        logits_MV = _gather_logits(model, hidden, context, packed) if context.is_last_stage else None
    logits_MV = _to_first_stage(logits_MV, architecture, context, packed.num_tokens)
    if logits_MV is None:
        return []
    logprobs_MV = torch.log_softmax(logits_MV[:, : architecture.vocab_size].float().cpu(), dim=-1)
    return [
        logprobs_MV[start : start + len(sequence)] for start, sequence in zip(packed.starts, sequences, strict=True)
    ]


def _forward(model: nn.Module, architecture: Architecture, context: ParallelContext, packed: PackedSequences) -> Tensor:
    """Run the packed row through all pipeline stages in turn; return the output of this rank's last stage."""
    pp, chunks = context.groups.pp, chunks_of(unwrap(model))
    rows = len(packed.tokens_M) // (context.layout.tensor if context.layout.sequence else 1)
    for number, chunk in enumerate(chunks):
        if number > 0 or not context.is_first_stage:
            received = torch.empty(
                (rows, 1, architecture.hidden_size), dtype=chunk.config.pipeline_dtype, device=context.device
            )
            dist.recv(received, group=pp, group_src=(pp.rank() - 1) % pp.size())
            chunk.set_input_tensor([received])
        hidden = chunk(
            input_ids=packed.tokens_M[None],
            position_ids=packed.positions_M[None],
            attention_mask=None,
            packed_seq_params=packed.packed_seq_params(),
        )
        if number < len(chunks) - 1 or not context.is_last_stage:
            dist.send(hidden.contiguous(), group=pp, group_dst=(pp.rank() + 1) % pp.size())
    return hidden


def _gather_logits(model: nn.Module, hidden: Tensor, context: ParallelContext, packed: PackedSequences) -> Tensor:
    """Gather the logits [rows of all context-parallel ranks, padded vocabulary] on every rank of the last stage."""
    bare, tp, cp = unwrap(model), context.groups.tp, context.groups.cp
    own_rows_M = torch.from_numpy(packed.own_rows_M).to(context.device)
    hidden_MH = hidden_rows(bare, hidden, torch.arange(len(own_rows_M), device=context.device), context.groups)
    own_MV = torch.cat(_gathered(torch.nn.functional.linear(hidden_MH, bare.head_weight()), tp), dim=-1)
    logits_MV = own_MV.new_empty(packed.num_tokens, own_MV.shape[1])
    for rows_M, part_MV in zip(_gathered(own_rows_M, cp), _gathered(own_MV, cp), strict=True):
        logits_MV[rows_M] = part_MV
    return logits_MV


def _gathered(values: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values, group=group)
    return parts


def _to_first_stage(
    logits_MV: Tensor | None, architecture: Architecture, context: ParallelContext, rows: int
) -> Tensor | None:
    """Send the last stage's logits to the replica's first rank; the others get None."""
    pp = context.groups.pp
    if context.groups.tp.rank() != 0 or context.groups.cp.rank() != 0:
        return None
    if pp.size() == 1:
        return logits_MV
    if logits_MV is not None:
        dist.send(logits_MV.float(), group=pp, group_dst=0)
    if not context.is_first_stage:
        return None
    shape = (rows, architecture.padded_vocab_size(context.layout.tensor))
    received = torch.empty(shape, dtype=torch.float32, device=context.device)
    dist.recv(received, group=pp, group_src=pp.size() - 1)
    return received
