"""Stand-ins for the prompts of a run and for its models: what methods of privileged context are given in tests."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from megatron_hdpo.data.prompts import Hint, HintedPrompt
from megatron_hdpo.types.learning import Score, Scoring, ScoringKey
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import TopKArrays

SMALLEST_VOCAB = 299
SUPPORT = 4
"""The k of every top k that `answers` gives."""


def ids_of(text: str, length: int = 6) -> np.ndarray:
    """int32 [length], a hash of the text."""
    digest = hashlib.blake2b(text.encode(), digest_size=2 * length).digest()
    return (np.frombuffer(digest, dtype=np.uint16) % SMALLEST_VOCAB).astype(np.int32)


class StubPrompts:
    """Ids that differ wherever problem or hint do, and a record of the hints that were shown.

    An attempt of more than 20 characters counts as cut, one token per further character.
    """

    def __init__(self, markers: Sequence[str] = ()) -> None:
        self.markers = markers
        self.shown: list[Hint] = []

    def privileged_prompt(self, problem: Problem) -> np.ndarray:
        return ids_of(f"truth of {problem.id}")

    def hinted(self, problem: Problem, hint: Hint) -> np.ndarray:
        self.shown.append(hint)
        return ids_of(f"{problem.id} {hint}", length=5)

    def hinted_prompt(self, problem: Problem, hint: Hint) -> HintedPrompt:
        return HintedPrompt(self.hinted(problem, hint), max(0, len(hint.attempt) - 20))


def answers(scorings: Sequence[Scoring], vocab: int = 40) -> dict[ScoringKey, Score]:
    """Scores of a made-up model: its logits are drawn anew for every (weights, context, response so far)."""
    logprobs = {s.key: np.stack([_logprobs(s, t, vocab) for t in range(len(s.response_ids))]) for s in scorings}
    return {s.key: _score(s, logprobs) for s in scorings}


def _logprobs(scoring: Scoring, t: int, vocab: int) -> np.ndarray:
    text = f"{scoring.role} {scoring.context_ids.tolist()} {scoring.response_ids[:t].tolist()}"
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    logits = np.random.default_rng(seed).normal(0, 1.5, vocab) / scoring.temperature
    return logits - np.logaddexp.reduce(logits)


def _score(scoring: Scoring, logprobs: dict[ScoringKey, np.ndarray]) -> Score:
    own = logprobs[scoring.key]
    ids = scoring.response_ids[:, None].astype(np.int64)
    entropy = -(np.exp(own) * own).sum(-1).astype(np.float32)
    at = None
    if scoring.at is not None:
        at = np.take_along_axis(own, top_of(logprobs[scoring.at], SUPPORT), -1).astype(np.float32)
    top = None
    if scoring.top_k:
        assert scoring.top_k == SUPPORT
        top_ids = top_of(own, SUPPORT)
        top = TopKArrays(top_ids.astype(np.int32), np.take_along_axis(own, top_ids, -1).astype(np.float32))
    return Score(np.take_along_axis(own, ids, -1)[:, 0].astype(np.float32), entropy, top, at)


def top_of(logprobs_TV: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-logprobs_TV, axis=-1, kind="stable")[:, :k]
