"""Chunks of tokens, target and hidden states for the chunked head, and the exchange of hidden states between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hdpo.divergence.dense_pass import DensePass
from megatron_hdpo.divergence.losses import flat_ids, run_pass
from megatron_hdpo.divergence.options import Options, Pass
from megatron_hdpo.divergence.shard import VocabShard
from megatron_hdpo.divergence.targets import FullLogits, Hidden, Target, TopK
from megatron_hdpo.types.transfer import join_to_device


@dataclass(frozen=True)
class Chunk:
    """The part of a run's tokens, and of its target's rows, that is computed at a time.

    local: among this rank's rows of the hidden states. parts: among all tokens, one slice for each rank whose hidden
    states the chunk joins (sequence parallelism), else one slice. target_parts: among the rows of the target, one for
    each of `parts`. target_rows: int64 [R], the chunk's token of each of those rows; None if each token has one.
    host_rows: the same on the host.
    """

    local: slice
    parts: list[slice]
    target_parts: list[slice]
    target_rows: Tensor | None = None
    host_rows: Tensor | None = None

    def take(self, values_T: Tensor) -> Tensor:
        """Select the chunk's values [n, ...] from those of all tokens [T, ...]; a view if it is of one part."""
        return _take(values_T, self.parts)

    def take_target(self, values_R: Tensor) -> Tensor:
        """Select the chunk's rows from those of the whole target."""
        return _take(values_R, self.target_parts)


def _take(values: Tensor, parts: Sequence[slice]) -> Tensor:
    return values[parts[0]] if len(parts) == 1 else torch.cat([values[part] for part in parts])


def join_chunks(values: Sequence[Tensor], chunks: Sequence[Chunk]) -> Tensor:
    """Join the values [n, ...] of all chunks to those of all tokens [T, ...], in token order."""
    pieces = [piece.chunk(len(chunk.parts)) for piece, chunk in zip(values, chunks, strict=True)]
    return torch.cat([piece for of_rank in zip(*pieces, strict=True) for piece in of_rank])


@dataclass(frozen=True)
class HeadRun:
    """The constant inputs of a run over chunks, flattened, and the exchange of hidden states between ranks."""

    shard: VocabShard
    ids_T: Tensor
    target: Target | None
    chunks: list[Chunk]
    sequence_parallel: bool

    @classmethod
    def of(
        cls,
        hidden_TH: Tensor,
        head_weight_VH: Tensor,
        sampled_ids_T: Tensor,
        target: Target | None,
        *,
        chunk: int,
        group: dist.ProcessGroup | None,
        vocab_size: int | None,
        sequence_parallel: bool,
    ) -> HeadRun:
        """Check the shapes and cut the tokens into chunks; raises ValueError on shapes that do not fit."""
        if head_weight_VH.dim() != 2 or head_weight_VH.shape[1] != hidden_TH.shape[-1]:
            raise ValueError(
                f"the head weight is {list(head_weight_VH.shape)}, the hidden size {hidden_TH.shape[-1]}: "
                "[V / tp, H] is needed"
            )
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}: at least 1 token per chunk")
        shard = VocabShard.of(head_weight_VH.shape[0], group, vocab_size)
        ranks = shard.size if sequence_parallel else 1
        lead = hidden_TH.shape[:-1]
        lead = torch.Size((lead[0] * ranks, *lead[1:])) if lead else lead
        ids_T = flat_ids(sampled_ids_T, lead, shard.vocab_size, hidden_TH.device)
        if target is not None:
            tokens = ids_T.shape[0]
            wide = isinstance(target, TopK)
            target = target.flat(tokens, shard.vocab_size if wide else shard.width, hidden_TH.device)
        chunks = _cut(ids_T.shape[0], ranks, chunk)
        if target is not None and target.rows is not None:
            chunks = _cut_target(chunks, target.rows, hidden_TH.device)
        return cls(shard, ids_T, target, chunks, sequence_parallel)

    def buffer(self, like: Tensor) -> Tensor:
        """Allocate [n, V / tp] for the logits of the largest chunk."""
        height = max((sum(p.stop - p.start for p in chunk.parts) for chunk in self.chunks), default=0)
        return like.new_empty((height, self.shard.width))

    def gather(self, piece_CH: Tensor) -> Tensor:
        """Return the hidden states of a whole chunk; under sequence parallelism the ranks' parts are all-gathered."""
        if not self.sequence_parallel:
            return piece_CH
        return self.shard.all_gather(piece_CH).flatten(0, 1)

    def scatter_sum(self, grad_CH: Tensor) -> Tensor:
        """Sum a chunk's hidden gradient over the ranks and return this rank's part (sequence parallelism only)."""
        if self.shard.size == 1:
            return grad_CH
        if dist.get_backend(self.shard.group) == "nccl":
            out = grad_CH.new_empty(grad_CH.shape[0] // self.shard.size, grad_CH.shape[1])
            dist.reduce_scatter_tensor(out, grad_CH.contiguous(), group=self.shard.group)
            return out
        (total_CH,) = self.shard.all_reduce_sum([grad_CH])  # gloo has no reduce-scatter
        return total_CH.chunk(self.shard.size)[self.shard.rank]

    def run_chunk(self, logits_CV: Tensor, chunk: Chunk, options: Options, *, remake: bool = False) -> Pass:
        """Run the pass over a chunk.

        remake: the pass does not keep the logits of a Hidden target; its gradient computes them again.
        """
        target = _part_of_target(self.target, chunk)
        if not isinstance(target, Hidden):
            return run_pass(logits_CV, chunk.take(self.ids_T), target, options)
        logits = FullLogits(target.hidden_TH @ target.head_weight_VH.t(), target.rows, target.host_rows)
        made = DensePass.run(logits_CV, chunk.take(self.ids_T), logits, options)
        return made.with_teacher(target) if remake else made


def _cut(tokens: int, ranks: int, chunk: int) -> list[Chunk]:
    """Cut all tokens into chunks; with sequence parallelism (ranks > 1) a chunk takes the same rows of every rank."""
    local, step = tokens // ranks, -(-chunk // ranks)
    chunks = []
    for start in range(0, local, step):
        cut = slice(start, min(start + step, local))
        parts = [slice(r * local + cut.start, r * local + cut.stop) for r in range(ranks)]
        chunks.append(Chunk(cut, parts, target_parts=parts))
    return chunks


def _cut_target(chunks: list[Chunk], rows_R: Tensor, device: torch.device) -> list[Chunk]:
    """Add to each chunk its rows of a target that covers the tokens `rows_R`.

    All is computed on the host and copied to the device at once. Only `rows_R` on a device must be waited for.
    """
    if not chunks:
        return []
    rows = rows_R.cpu().numpy()
    cuts, places = [], []
    for chunk in chunks:
        height = chunk.local.stop - chunk.local.start
        edges = np.searchsorted(rows, [(p.start, p.stop) for p in chunk.parts]).tolist()
        cut = [slice(first, last) for first, last in edges]
        shifted = [rows[c] - p.start + i * height for i, (c, p) in enumerate(zip(cut, chunk.parts, strict=True))]
        cuts.append(cut)
        places.append(np.concatenate(shifted))
    on_device = join_to_device(places, torch.int64, device)
    return [
        replace(chunk, target_parts=cut, target_rows=own, host_rows=torch.from_numpy(place))
        for chunk, cut, own, place in zip(chunks, cuts, on_device, places, strict=True)
    ]


def _part_of_target(target: Target | None, chunk: Chunk) -> Target | None:
    """Return the part of a flat target that belongs to a chunk's tokens."""
    take, rows = chunk.take_target, (chunk.target_rows, chunk.host_rows)
    if target is None:
        return None
    if isinstance(target, TopK):
        return TopK(take(target.ids_TK), take(target.logprobs_TK), *rows)
    if isinstance(target, Hidden):
        return Hidden(take(target.hidden_TH), target.head_weight_VH, *rows)
    return FullLogits(take(target.logits_TV_local), *rows)
