"""Micro-batches: packed examples, and for every response token the row of the logits that predict it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_hdpo.divergence import Hidden, TopK
from megatron_hdpo.model.packing import PackedSequences, RowLayout, pack
from megatron_hdpo.model.routing_replay import pack_routing
from megatron_hdpo.types.learning import Example, HiddenOnHost, Scoring
from megatron_hdpo.types.rollouts import TopKArrays
from megatron_hdpo.types.transfer import join_to_device

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class MicroBatch:
    """The tokens of a micro-batch on this rank.

    packed: prompts and responses. rows_N: the row of each response token's logits; the token itself is in the next row.
    responses: number of tokens of each response, in order.

    Under context parallelism the N tokens are those whose logits this rank computes; places_N holds their indices among
    all response tokens (None: this rank has all), host_places_N the same on the host. `responses` counts the tokens of
    all ranks.
    routed_experts_MLK: experts for the rows of this rank, on the host (`pack_routing`); None if the routers choose.
    """

    packed: PackedSequences
    rows_N: Tensor
    sampled_ids_N: Tensor
    responses: tuple[int, ...]
    places_N: Tensor | None = None
    host_places_N: np.ndarray | None = None
    routed_experts_MLK: Tensor | None = None

    def own(self, values: Tensor) -> Tensor:
        """Select this rank's values [N, ...] from those of all response tokens [all, ...]."""
        return values if self.places_N is None else values.index_select(0, self.places_N)

    def own_on_host(self, values: Tensor) -> Tensor:
        """Select this rank's values from those of all response tokens, both on the host."""
        return values if self.host_places_N is None else values[torch.from_numpy(self.host_places_N)]

    def whole(self, values: Tensor, group: ProcessGroup) -> Tensor:
        """Join the values [N, ...] of the context-parallel ranks to those of all response tokens, on every rank.

        Collective over the context-parallel group.
        """
        if self.places_N is None:
            return values
        joined = values.new_zeros(sum(self.responses), *values.shape[1:])
        joined[self.places_N] = values  # each token belongs to exactly one rank, so the sum is exact
        dist.all_reduce(joined, group=group)
        return joined


@dataclass(frozen=True)
class LossInputs:
    """Loss inputs of a micro-batch's N response tokens, float32 [N] each.

    old_N, rollout_N: log-probs of the ratio's denominators; NaN stands for the policy's own log-prob. reference_N: NaN
    for no penalty. own_N: 1 for tokens of the student's own rollouts, else 0. moved: whether any response has
    denominators of its own. target: the teacher's distribution at the
    tokens that have one (its `rows`, on the host, index the N tokens); None if no token has one.
    """

    advantages_N: Tensor
    surrogate_weights_N: Tensor
    old_N: Tensor
    rollout_N: Tensor
    distill_weights_N: Tensor
    reference_N: Tensor
    own_N: Tensor
    moved: bool
    target: TopK | Hidden | None

    def select(self, take: Callable[[Tensor], Tensor]) -> LossInputs:
        """Return the inputs of the tokens whose values `take` selects, without their targets."""
        return LossInputs(
            advantages_N=take(self.advantages_N),
            surrogate_weights_N=take(self.surrogate_weights_N),
            old_N=take(self.old_N),
            rollout_N=take(self.rollout_N),
            distill_weights_N=take(self.distill_weights_N),
            reference_N=take(self.reference_N),
            own_N=take(self.own_N),
            moved=self.moved,
            target=None,
        )


@dataclass(frozen=True)
class MicroBatchShape:
    """Sizes of a micro-batch on this rank.

    rows: tokens, padding included. longest: rows of the longest sequence, over all ranks. responses: rows that the head
    reads. targets: responses with a target, of `top_k` ids or, if `full`, over the whole vocabulary.
    """

    rows: int
    longest: int
    responses: int
    targets: int = 0
    top_k: int = 0
    full: bool = False


def shape_of(batch: MicroBatch, inputs: LossInputs | None) -> MicroBatchShape:
    """Return the sizes of a micro-batch; without inputs, on a stage before the last, it has no targets."""
    target = None if inputs is None else inputs.target
    return MicroBatchShape(
        rows=len(batch.packed.tokens_M),
        longest=batch.packed.longest,
        responses=len(batch.rows_N),
        targets=0 if target is None or target.rows is None else len(target.rows),
        top_k=target.ids_TK.shape[-1] if isinstance(target, TopK) else 0,
        full=isinstance(target, Hidden),
    )


def response_micro_batch(
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    device: torch.device,
    layout: RowLayout | None = None,
    routed_experts: Sequence[np.ndarray | None] = (),
) -> MicroBatch:
    """Pack pairs of prompt and response; the last prompt token predicts the first response token.

    routed_experts: for each pair, the experts of its tokens (`Example.routed_experts`); empty if no pair has any.
    """
    sequences = [np.concatenate([prompt, response]) for prompt, response in zip(prompts, responses, strict=True)]
    packed = pack(sequences, _HOST, layout)
    rows = [
        start + len(prompt) - 1 + np.arange(len(response))
        for start, prompt, response in zip(packed.starts, prompts, responses, strict=True)
    ]
    places, own = packed.own(_concatenate(rows, np.int64))
    sampled = _concatenate(responses, np.int64)[places]
    shared = layout is not None and layout.context > 1
    experts = pack_routing(packed, routed_experts, [len(ids) for ids in sequences]) if routed_experts else None
    # One transfer of int32; the boundaries come first, because attention kernels want them aligned.
    arrays = packed.cu_seqlens.numpy(), packed.tokens_M.numpy(), packed.positions_M.numpy(), own, sampled, places
    boundaries, *moved = join_to_device(arrays, torch.int32, device)
    tokens_M, positions_M, rows_N, sampled_N, places_N = (values.to(torch.int64) for values in moved)
    return MicroBatch(
        packed=replace(packed, cu_seqlens=boundaries, tokens_M=tokens_M, positions_M=positions_M),
        rows_N=rows_N,
        sampled_ids_N=sampled_N,
        responses=tuple(len(response) for response in responses),
        places_N=places_N if shared else None,
        host_places_N=places if shared else None,
        routed_experts_MLK=experts,
    )


def example_micro_batch(
    examples: Sequence[Example], device: torch.device, layout: RowLayout | None = None
) -> MicroBatch:
    """Pack the tokens of a micro-batch of examples; every pipeline stage needs them."""
    return response_micro_batch(
        [e.prompt_ids for e in examples],
        [e.response_ids for e in examples],
        device,
        layout,
        [e.routed_experts for e in examples],
    )


def scoring_micro_batch(
    scorings: Sequence[Scoring], device: torch.device, layout: RowLayout | None = None
) -> MicroBatch:
    """Pack the tokens of a micro-batch of scorings."""
    return response_micro_batch(
        [s.context_ids for s in scorings],
        [s.response_ids for s in scorings],
        device,
        layout,
        [s.routed_experts for s in scorings],
    )


def loss_inputs(
    examples: Sequence[Example],
    device: torch.device,
    teacher_head: Tensor | None = None,
    places: np.ndarray | None = None,
) -> LossInputs:
    """Build the loss inputs of a micro-batch of examples; only the last pipeline stage needs them.

    teacher_head: [V / tp, H], for targets that are hidden states; those stay on the host until their loss is computed.
    places: indices of this rank's response tokens (`MicroBatch.host_places_N`); None for all.
    """

    def tokens(read: Callable[[Example], np.ndarray | None], missing: float) -> np.ndarray:
        parts = [np.full(len(e.response_ids), missing) if (v := read(e)) is None else v for e in examples]
        values = _concatenate(parts, np.float32)
        return values if places is None else values[places]

    arrays = [
        tokens(lambda e: e.advantages_T, 0.0),
        tokens(lambda e: e.surrogate_weights_T, 0.0),
        tokens(lambda e: e.old_logprobs_T, np.nan),
        tokens(lambda e: e.rollout_logprobs_T, np.nan),
        tokens(lambda e: e.distill_weights_T, 0.0),
        tokens(lambda e: e.reference_logprobs_T, np.nan),
        tokens(lambda e: np.full(len(e.response_ids), e.own_rollout), 0.0),
    ]
    advantages, surrogate_weights, old, rollout, distill_weights, reference, own = join_to_device(
        arrays, torch.float32, device
    )
    return LossInputs(
        advantages_N=advantages,
        surrogate_weights_N=surrogate_weights,
        old_N=old,
        rollout_N=rollout,
        distill_weights_N=distill_weights,
        reference_N=reference,
        own_N=own,
        moved=any(e.old_logprobs_T is not None for e in examples),
        target=_target(examples, device, teacher_head, places),
    )


def _target(
    examples: Sequence[Example], device: torch.device, teacher_head: Tensor | None, places: np.ndarray | None
) -> TopK | Hidden | None:
    starts = np.cumsum([0, *(len(e.response_ids) for e in examples)])
    aimed = [(start, e.target) for start, e in zip(starts, examples, strict=False) if e.target is not None]
    if not aimed:
        return None
    spans = [
        (start, len(target.hidden_TH if isinstance(target, HiddenOnHost) else target.ids_TK)) for start, target in aimed
    ]
    kept, own = _own_rows(_rows(spans), places)
    if not len(kept):
        return None
    rows = torch.from_numpy(own)
    # A step has targets of one type.
    if isinstance(aimed[0][1], HiddenOnHost):
        assert teacher_head is not None
        hidden = torch.cat([cast(HiddenOnHost, target).hidden_TH for _, target in aimed])
        return Hidden(hidden if places is None else hidden[torch.from_numpy(kept)], teacher_head, rows)
    tops = [cast(TopKArrays, target) for _, target in aimed]
    (ids,) = join_to_device([np.concatenate([top.ids_TK for top in tops])[kept]], torch.int32, device)
    (logprobs,) = join_to_device([np.concatenate([top.logprobs_TK for top in tops])[kept]], torch.float32, device)
    return TopK(ids.to(torch.int64), logprobs, rows)


def _own_rows(rows: np.ndarray, places: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return which target rows (indices of response tokens) are in `places`, and their positions in `places`."""
    if places is None:
        return np.arange(len(rows)), rows
    kept = np.flatnonzero(np.isin(rows, places))
    return kept, np.searchsorted(places, rows[kept])


def _rows(spans: Iterable[tuple[int, int]]) -> np.ndarray:
    return np.concatenate([start + np.arange(length) for start, length in spans])


def _concatenate(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype=dtype)
