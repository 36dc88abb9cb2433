"""Log-probs over the whole vocabulary, for comparisons with a reference; training never computes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.chunks import chunks_of, unwrap
from megatron_hdpo.model.network import hidden_rows
from megatron_hdpo.model.packing import PackedSequences, RowLayout, pack
from megatron_hdpo.parallel.context import ParallelContext

ROWS = 256
"""Positions whose log-probs over the whole vocabulary are in memory at once."""


def packed_logprobs(
    model: nn.Module, architecture: Architecture, context: ParallelContext, sequences: Sequence[np.ndarray]
) -> list[Tensor]:
    """Compute log_softmax of the next token at every position: fp32 [length, vocabulary] per sequence, on the CPU.

    The sequences go through the model as one packed row. Collective within a replica, and over the ranks that share
    its experts; the replica's first rank gets the result, the others an empty list.
    """
    parts: list[list[Tensor]] = [[] for _ in sequences]
    for number, _, logprobs_RV in packed_logprob_rows(model, architecture, context, sequences):
        parts[number].append(logprobs_RV)
    return [torch.cat(own) for own in parts] if context.is_replica_leader else []


@torch.no_grad()
def packed_logprob_rows(
    model: nn.Module,
    architecture: Architecture,
    context: ParallelContext,
    sequences: Sequence[np.ndarray],
    rows: int = ROWS,
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (sequence, first position, log-probs) as `packed_logprobs`, of at most `rows` positions at a time.

    log-probs: fp32 [<= rows, vocabulary], on the CPU. Collective like `packed_logprobs`: each rank must iterate to the
    end, also those that get nothing.
    """
    multiple, cp = context.layout.tensor if context.layout.sequence else 1, context.groups.cp
    packed = pack(sequences, context.device, RowLayout(multiple, cp.size(), cp.rank()))
    with context.megatron_calls():
        hidden = _forward(model, architecture, context, packed)
        hidden_MH = _whole_rows(model, hidden, context, packed) if context.is_last_stage else None
    del hidden
    for number, sequence in enumerate(sequences):
        for first in range(0, len(sequence), rows):
            count = min(rows, len(sequence) - first)
            logits_RV = None
            if hidden_MH is not None:
                start = packed.starts[number] + first
                logits_RV = _logits(model, hidden_MH[start : start + count], context)
            logits_RV = _to_first_stage(logits_RV, architecture, context, count)
            if logits_RV is not None:
                yield number, first, torch.log_softmax(logits_RV[:, : architecture.vocab_size].float().cpu(), dim=-1)


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


def _whole_rows(model: nn.Module, hidden: Tensor, context: ParallelContext, packed: PackedSequences) -> Tensor:
    """Gather the input of the head [rows of all context-parallel ranks, H] on every rank of the last stage."""
    own_rows_M = torch.from_numpy(packed.own_rows_M).to(context.device)
    indices_M = torch.arange(len(own_rows_M), device=context.device)
    own_MH = hidden_rows(unwrap(model), hidden, indices_M, context.groups)
    whole_MH = own_MH.new_empty(packed.num_tokens, own_MH.shape[1])
    cp = context.groups.cp
    for rows_M, part_MH in zip(_gathered(own_rows_M, cp), _gathered(own_MH, cp), strict=True):
        whole_MH[rows_M] = part_MH
    return whole_MH


def _logits(model: nn.Module, hidden_RH: Tensor, context: ParallelContext) -> Tensor:
    """Return the logits [R, padded vocabulary] of rows of the head's input. Collective over tensor-parallel ranks."""
    own_RV = torch.nn.functional.linear(hidden_RH, unwrap(model).head_weight())
    return torch.cat(_gathered(own_RV, context.groups.tp), dim=-1)


def _gathered(values: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values, group=group)
    return parts


def _to_first_stage(
    logits_RV: Tensor | None, architecture: Architecture, context: ParallelContext, rows: int
) -> Tensor | None:
    """Send the last stage's logits to the replica's first rank; the others get None."""
    pp = context.groups.pp
    if context.groups.tp.rank() != 0 or context.groups.cp.rank() != 0:
        return None
    if pp.size() == 1:
        return logits_RV
    if logits_RV is not None:
        dist.send(logits_RV.float(), group=pp, group_dst=0)
    if not context.is_first_stage:
        return None
    shape = (rows, architecture.padded_vocab_size(context.layout.tensor))
    received = torch.empty(shape, dtype=torch.float32, device=context.device)
    dist.recv(received, group=pp, group_src=pp.size() - 1)
    return received
