"""Scores of the response tokens of a micro-batch, computed from the last stage's hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_hdpo.divergence import (
    DivergenceSpec,
    FullLogits,
    logit_losses,
    vocab_parallel_logprobs,
    vocab_parallel_topk,
)
from megatron_hdpo.model.micro_batch import MicroBatch
from megatron_hdpo.types.learning import ModelRole, Score, Scoring, ScoringKey
from megatron_hdpo.types.rollouts import TopKArrays
from megatron_hdpo.types.transfer import to_device, to_host

T = TypeVar("T")


@dataclass(frozen=True)
class ScoringSettings:
    """Settings that all scorings of a micro-batch have in common.

    at: number of ids of another scoring at which log-probs are wanted, 0 for none. kl_to: the weights of the scoring
    to which the reverse KL is wanted.
    """

    temperature: float
    top_k: int
    at: int = 0
    hidden: bool = False
    kl_to: ModelRole | None = None


def settings_of(scoring: Scoring, asked: Mapping[ScoringKey, Scoring]) -> ScoringSettings:
    """Return the settings of a scoring. asked: all scorings of the step, including those that this one refers to."""
    at = 0 if scoring.at is None else asked[scoring.at].top_k
    kl_to = None if scoring.reverse_kl_to is None else asked[scoring.reverse_kl_to].role
    return ScoringSettings(scoring.temperature, scoring.top_k, at, scoring.hidden, kl_to)


def by_dependency(scorings: Sequence[Scoring]) -> dict[tuple[int, ModelRole], list[Scoring]]:
    """Group the scorings by (wave, weights), so that each refers only to scorings of earlier waves.

    Raises ValueError when a key is used twice, or a scoring refers to one that is missing, is of another response, does
    not compute what is wanted from it, or refers back.
    """
    asked = {scoring.key: scoring for scoring in scorings}
    if len(asked) < len(scorings):
        raise ValueError("two scorings of a step have the same key")
    for scoring in scorings:
        _check_references(scoring, asked)
    waves: dict[tuple[int, ModelRole], list[Scoring]] = {}
    for scoring in scorings:
        waves.setdefault((_depth(scoring, asked), scoring.role), []).append(scoring)
    return waves


def _references(scoring: Scoring) -> list[ScoringKey]:
    return [key for key in (scoring.at, scoring.reverse_kl_to) if key is not None]


def _check_references(scoring: Scoring, asked: Mapping[ScoringKey, Scoring]) -> None:
    for key in _references(scoring):
        if key not in asked:
            raise ValueError(f"scoring {scoring.key} refers to {key}, which is not asked for")
        if not np.array_equal(asked[key].response_ids, scoring.response_ids):
            raise ValueError(f"scoring {scoring.key} refers to {key}, which is of another response")
    if scoring.at is not None and not asked[scoring.at].top_k:
        raise ValueError(f"scoring {scoring.key} wants the ids of {scoring.at}, which has no top_k")
    if scoring.reverse_kl_to is not None and not asked[scoring.reverse_kl_to].hidden:
        raise ValueError(f"scoring {scoring.key} wants the KL to {scoring.reverse_kl_to}, which keeps no hidden states")


def _depth(scoring: Scoring, asked: Mapping[ScoringKey, Scoring], seen: tuple[ScoringKey, ...] = ()) -> int:
    if scoring.key in seen:
        raise ValueError(f"scoring {scoring.key} refers back to itself")
    seen = (*seen, scoring.key)
    return max((1 + _depth(asked[key], asked, seen) for key in _references(scoring)), default=0)


@dataclass(frozen=True)
class ScoringContext:
    """Results that scorings of later waves may refer to.

    asked: all scorings of the step. scores: the scores so far. heads: [V / tp, H] on the device, for the weights whose
    hidden states were kept.
    """

    asked: Mapping[ScoringKey, Scoring]
    scores: Mapping[ScoringKey, Score]
    heads: Mapping[ModelRole, Tensor]


def score_rows(
    hidden_NH: Tensor,
    head_weight_VH: Tensor,
    batch: MicroBatch,
    scorings: Sequence[Scoring],
    answered: ScoringContext,
    groups: ProcessGroupCollection,
    vocab_size: int,
    head_chunk: int,
) -> dict[ScoringKey, Score]:
    """Compute the scores of the scorings whose responses are the N rows of a micro-batch, in order.

    hidden_NH: whole on every tensor-parallel rank. head_weight_VH: [V / tp, H], this rank's shard. At most `head_chunk`
    rows have logits at a time. All ranks of the tensor- and context-parallel groups must call it together; all get the
    scores, whose values are there only after `wait_for_copies`.
    """
    if not scorings:
        return {}
    settings = settings_of(scorings[0], answered.asked)
    rows = _Rows(settings, scorings, answered, batch, {"group": groups.tp, "vocab_size": vocab_size})
    for start in range(0, max(1, len(hidden_NH)), head_chunk):
        chunk = slice(start, start + head_chunk)
        rows.add(F.linear(hidden_NH[chunk], head_weight_VH), batch.sampled_ids_N[chunk], chunk)
    columns = {name: _on_host(batch.whole(torch.cat(parts), groups.cp)) for name, parts in rows.columns.items()}
    hidden = to_host(batch.whole(hidden_NH.detach(), groups.cp)) if settings.hidden else None
    edges = np.cumsum([0, *batch.responses])
    return {
        scoring.key: _score(columns, hidden, slice(first, last))
        for scoring, first, last in zip(scorings, edges, edges[1:], strict=False)
    }


class _Shard(TypedDict):
    """The ranks that share the vocabulary, and its size without padding."""

    group: ProcessGroup
    vocab_size: int


class _Rows:
    """Accumulator of a micro-batch's scores, filled by one chunk of logits after the other."""

    def __init__(
        self,
        settings: ScoringSettings,
        scorings: Sequence[Scoring],
        answered: ScoringContext,
        batch: MicroBatch,
        shard: _Shard,
    ) -> None:
        self.settings, self.shard = settings, shard
        self.columns: dict[str, list[Tensor]] = {}
        self.at_ids_NK: Tensor | None = None
        self.teacher_NH: Tensor | None = None
        self.head_VH: Tensor | None = None
        if settings.at:
            tops = [_given(answered.scores[_given(s.at)].top) for s in scorings]
            ids = batch.own_on_host(torch.from_numpy(np.concatenate([top.ids_TK for top in tops])))
            self.at_ids_NK = to_device(ids, batch.rows_N.device)
        if settings.kl_to is not None:
            aims = [answered.scores[_given(s.reverse_kl_to)] for s in scorings]
            self.teacher_NH = batch.own_on_host(torch.cat([_given(aim.hidden_TH) for aim in aims]))
            self.head_VH = answered.heads[settings.kl_to]

    def add(self, logits_CV: Tensor, sampled_C: Tensor, rows: slice) -> None:
        """Compute the scores of a chunk of rows from its logits [n, V / tp]."""
        temperature, device = self.settings.temperature, logits_CV.device
        target = None
        if self.teacher_NH is not None:
            target = FullLogits(F.linear(to_device(self.teacher_NH[rows], device), _given(self.head_VH)))
        losses = logit_losses(
            logits_CV,
            sampled_C,
            target,
            spec=DivergenceSpec("reverse_kl"),
            temperature=temperature,
            distill_temperature=temperature,
            **self.shard,
        )
        self._put(logprobs=_given(losses.logprobs_T), entropy=_given(losses.entropy_T))
        if target is not None:
            self._put(reverse_kl=_given(losses.divergence_T))
        if self.settings.top_k:
            found = vocab_parallel_topk(logits_CV, self.settings.top_k, temperature=temperature, **self.shard)
            self._put(ids=found.ids_TK.to(torch.int32), top=found.logprobs_TK)
        if self.at_ids_NK is not None:
            self._put(at=vocab_parallel_logprobs(logits_CV, self.at_ids_NK[rows], temperature, **self.shard))

    def _put(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value)


def _given(value: T | None) -> T:
    """Return a value that is there, as it was asked for (all scorings of a micro-batch ask for the same)."""
    assert value is not None
    return value


def _score(columns: Mapping[str, np.ndarray], hidden_NH: Tensor | None, rows: slice) -> Score:
    def part(name: str) -> np.ndarray | None:
        return columns[name][rows] if name in columns else None

    return Score(
        logprobs_T=columns["logprobs"][rows],
        entropy_T=columns["entropy"][rows],
        top=TopKArrays(columns["ids"][rows], columns["top"][rows]) if "ids" in columns else None,
        at_logprobs_TK=part("at"),
        hidden_TH=None if hidden_NH is None else hidden_NH[rows],
        reverse_kl_T=part("reverse_kl"),
    )


def _on_host(whole: Tensor) -> np.ndarray:
    return to_host(whole.float() if whole.is_floating_point() else whole).numpy()
