"""Chunks of tokens, target and hidden states for the chunked head, and the exchange of hidden states between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hdpo.divergence.dense_pass import DensePass
from megatron_hdpo.divergence.losses import flat_ids, run_pass
from megatron_hdpo.divergence.options import Options, Pass
from megatron_hdpo.divergence.shard import VocabShard
from megatron_hdpo.divergence.targets import FullLogits, Hidden, Target, TopK


@dataclass(frozen=True)
class Chunk:
    """Indices of a chunk's tokens.

    local: among this rank's rows of the hidden states. parts: among all tokens, one slice for each rank whose hidden
    states the chunk joins (sequence parallelism), else one slice.
    """

    local: slice
    parts: list[slice]

    def places(self, device: torch.device) -> Tensor:
        """Return the indices of the chunk's tokens among all tokens, int64 [n]."""
        return torch.cat([torch.arange(p.start, p.stop, device=device) for p in self.parts])

    def take(self, values_T: Tensor) -> Tensor:
        """Select the chunk's values [n, ...] from those of all tokens [T, ...]."""
        return values_T[self.parts[0]] if len(self.parts) == 1 else torch.cat([values_T[p] for p in self.parts])

    def put(self, values_C: Tensor, out_T: Tensor) -> None:
        """Write the chunk's values [n, ...] to their tokens in `out_T` [T, ...]."""
        for part, piece in zip(self.parts, values_C.chunk(len(self.parts)), strict=True):
            out_T[part] = piece


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
        return cls(shard, ids_T, target, _cut(ids_T.shape[0], ranks, chunk), sequence_parallel)

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
        logits = FullLogits(target.hidden_TH @ target.head_weight_VH.t(), target.rows)
        made = DensePass.run(logits_CV, chunk.take(self.ids_T), logits, options)
        return made.with_teacher(target) if remake else made


def _cut(tokens: int, ranks: int, chunk: int) -> list[Chunk]:
    """Cut all tokens into chunks; with sequence parallelism (ranks > 1) a chunk takes the same rows of every rank."""
    local, step = tokens // ranks, -(-chunk // ranks)
    cuts = [slice(a, min(a + step, local)) for a in range(0, local, step)]
    return [Chunk(c, [slice(r * local + c.start, r * local + c.stop) for r in range(ranks)]) for c in cuts]


def _part_of_target(target: Target | None, chunk: Chunk) -> Target | None:
    """Return the part of a flat target that belongs to a chunk's tokens."""
    if target is None:
        return None
    pick, rows = _pick_rows(target.rows, chunk)

    def take(values_R: Tensor) -> Tensor:
        return values_R[pick[0]] if len(pick) == 1 else torch.cat([values_R[p] for p in pick])

    if isinstance(target, TopK):
        return TopK(take(target.ids_TK), take(target.logprobs_TK), rows)
    if isinstance(target, Hidden):
        return Hidden(take(target.hidden_TH), target.head_weight_VH, rows)
    return FullLogits(take(target.logits_TV_local), rows)


def _pick_rows(rows: Tensor | None, chunk: Chunk) -> tuple[Sequence[slice], Tensor | None]:
    """Return which target rows belong to a chunk, and the indices of their tokens in the chunk."""
    if rows is None:
        return chunk.parts, None
    edges = torch.tensor([(p.start, p.stop) for p in chunk.parts], device=rows.device)
    pick = [slice(a, b) for a, b in torch.searchsorted(rows, edges).tolist()]
    height = chunk.local.stop - chunk.local.start
    places = [rows[s] - p.start + i * height for i, (s, p) in enumerate(zip(pick, chunk.parts, strict=True))]
    return pick, torch.cat(places)
