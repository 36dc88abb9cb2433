"""Micro-batches: packed examples, and for every response token the row of the logits that predict it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class MicroBatch:
    """The tokens of a micro-batch on this rank.

    packed: prompts and responses. rows_N: the row of each response token's logits; the token itself is in the next row.
    responses: number of tokens of each response, in order.

    Under context parallelism the N tokens are those whose logits this rank computes; places_N holds their indices among
    all response tokens (None: this rank has all). `responses` counts the tokens of all ranks.
    routed_experts_MLK: experts for the rows of this rank, on the host (`pack_routing`); None if the routers choose.
    """

    packed: PackedSequences
    rows_N: Tensor
    sampled_ids_N: Tensor
    responses: tuple[int, ...]
    places_N: Tensor | None = None
    routed_experts_MLK: Tensor | None = None

    def own(self, values: Tensor) -> Tensor:
        """Select this rank's values [N, ...] from those of all response tokens [all, ...]."""
        return values if self.places_N is None else values.index_select(0, self.places_N.to(values.device))

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
    for no penalty. moved: whether any response has denominators of its own. target: the teacher's distribution at the
    tokens that have one (its `rows` index the N tokens); None if no token has one.
    """

    advantages_N: Tensor
    surrogate_weights_N: Tensor
    old_N: Tensor
    rollout_N: Tensor
    distill_weights_N: Tensor
    reference_N: Tensor
    moved: bool
    target: TopK | Hidden | None

    def at(self, places: Tensor) -> LossInputs:
        """Return the inputs of some of the tokens (int64 indices into the N tokens), without their targets."""
        return LossInputs(
            advantages_N=self.advantages_N[places],
            surrogate_weights_N=self.surrogate_weights_N[places],
            old_N=self.old_N[places],
            rollout_N=self.rollout_N[places],
            distill_weights_N=self.distill_weights_N[places],
            reference_N=self.reference_N[places],
            moved=self.moved,
            target=None,
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
    packed = pack(sequences, device, layout)
    rows = [
        start + len(prompt) - 1 + np.arange(len(response))
        for start, prompt, response in zip(packed.starts, prompts, responses, strict=True)
    ]
    places, own = packed.own(_concatenate(rows, np.int64))
    sampled = _concatenate(responses, np.int64)[places]
    shared = layout is not None and layout.context > 1
    experts = pack_routing(packed, routed_experts, [len(ids) for ids in sequences]) if routed_experts else None
    return MicroBatch(
        packed=packed,
        rows_N=torch.from_numpy(own).to(device),
        sampled_ids_N=torch.from_numpy(sampled).to(device),
        responses=tuple(len(response) for response in responses),
        places_N=torch.from_numpy(places).to(device) if shared else None,
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
    places_N: Tensor | None = None,
) -> LossInputs:
    """Build the loss inputs of a micro-batch of examples; only the last pipeline stage needs them.

    teacher_head: [V / tp, H], for targets that are hidden states; those stay on the host until their loss is computed.
    places_N: indices of this rank's response tokens (`MicroBatch.places_N`); None for all.
    """
    places = None if places_N is None else places_N.cpu().numpy()

    def tokens(read: Callable[[Example], np.ndarray | None], missing: float) -> Tensor:
        parts = [np.full(len(e.response_ids), missing) if (v := read(e)) is None else v for e in examples]
        values = _concatenate(parts, np.float32)
        return torch.from_numpy(values if places is None else values[places]).to(device)

    return LossInputs(
        advantages_N=tokens(lambda e: e.advantages_T, 0.0),
        surrogate_weights_N=tokens(lambda e: e.surrogate_weights_T, 0.0),
        old_N=tokens(lambda e: e.old_logprobs_T, np.nan),
        rollout_N=tokens(lambda e: e.rollout_logprobs_T, np.nan),
        distill_weights_N=tokens(lambda e: e.distill_weights_T, 0.0),
        reference_N=tokens(lambda e: e.reference_logprobs_T, np.nan),
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
    kept, rows = _own_rows(_rows(spans), places)
    if not len(kept):
        return None
    # A step has targets of one type.
    if isinstance(aimed[0][1], HiddenOnHost):
        assert teacher_head is not None
        hidden = torch.cat([cast(HiddenOnHost, target).hidden_TH for _, target in aimed])
        return Hidden(
            hidden if places is None else hidden[torch.from_numpy(kept)], teacher_head, torch.from_numpy(rows)
        )
    tops = [cast(TopKArrays, target) for _, target in aimed]
    ids = np.concatenate([top.ids_TK for top in tops]).astype(np.int64)[kept]
    logprobs = np.concatenate([top.logprobs_TK for top in tops])[kept]
    return TopK(
        torch.from_numpy(ids).to(device), torch.from_numpy(logprobs).to(device), torch.from_numpy(rows).to(device)
    )


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
