"""Log-probs, entropy and top k of the response tokens of a micro-batch, from the last stage's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_hdpo.divergence import logit_losses, vocab_parallel_topk
from megatron_hdpo.model.micro_batch import MicroBatch
from megatron_hdpo.objectives.interface import Score, Scoring, ScoringKey
from megatron_hdpo.rollout.types import TopLogprobs


@dataclass(frozen=True)
class ScoringSettings:
    """What scorings must agree on to share a micro-batch."""

    temperature: float
    top_k: int

    @classmethod
    def of(cls, scoring: Scoring) -> ScoringSettings:
        """The settings of a scoring."""
        return cls(scoring.temperature, scoring.top_k)


def score_rows(
    hidden_NH: Tensor,
    head_weight_VH: Tensor,
    batch: MicroBatch,
    scorings: Sequence[Scoring],
    groups: ProcessGroupCollection,
    vocab_size: int,
    head_chunk: int,
) -> dict[ScoringKey, Score]:
    """Scores of the scorings whose responses are the N rows, in order. No more than `head_chunk` rows have logits at a
    time. All ranks of the tensor-parallel group must call it together; all get the scores."""
    if not scorings:
        return {}
    settings = ScoringSettings.of(scorings[0])
    shard = {"group": groups.tp, "vocab_size": vocab_size}
    logprobs, entropies, ids, tops = [], [], [], []
    for hidden, sampled in zip(hidden_NH.split(head_chunk), batch.sampled_ids_N.split(head_chunk), strict=True):
        logits = F.linear(hidden, head_weight_VH)
        losses = logit_losses(logits, sampled, None, temperature=settings.temperature, **shard)
        logprobs.append(losses.logprobs_T)
        entropies.append(losses.entropy_T)
        if settings.top_k:
            scaled = logits if settings.temperature == 1.0 else logits / settings.temperature
            found = vocab_parallel_topk(scaled, settings.top_k, **shard)
            ids.append(found.ids_TK.to(torch.int32))
            tops.append(found.logprobs_TK)
    columns = [_on_host(column) for column in (logprobs, entropies, ids, tops)]
    edges = np.cumsum([0, *batch.responses])
    return {
        scoring.key: _score(columns, slice(first, last))
        for scoring, first, last in zip(scorings, edges, edges[1:], strict=False)
    }


def _score(columns: list[np.ndarray | None], rows: slice) -> Score:
    logprobs, entropy, ids, tops = columns
    assert logprobs is not None and entropy is not None
    top = None if ids is None or tops is None else TopLogprobs(ids[rows], tops[rows])
    return Score(logprobs[rows], entropy[rows], top)


def _on_host(parts: list[Tensor]) -> np.ndarray | None:
    if not parts:
        return None
    whole = torch.cat(parts)
    return (whole.float() if whole.is_floating_point() else whole).cpu().numpy()
