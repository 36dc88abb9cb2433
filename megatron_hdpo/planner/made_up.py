"""Made-up prompts and scores, for asking an objective what it does without a model: by the plan and by rehearsals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from megatron_hdpo.data.prompts import Hint, HintedPrompt
from megatron_hdpo.types.learning import Score, Scoring, ScoringKey
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import TopKArrays


@dataclass(frozen=True)
class PromptsOfLength:
    """Privileged prompts of one length, in tokens; PrivilegedPrompts for objectives."""

    tokens: int
    markers: tuple[str, ...] = ()

    def privileged_prompt(self, problem: Problem) -> np.ndarray:
        """Return the privileged prompt, int32 [P]."""
        return np.ones(self.tokens, dtype=np.int32)

    def hinted_prompt(self, problem: Problem, hint: Hint) -> HintedPrompt:
        """Return the prompt with a hint."""
        return HintedPrompt(self.privileged_prompt(problem))


def random_score(scoring: Scoring, top_k_of: Mapping[ScoringKey, int], rng: np.random.Generator) -> Score:
    """Return a random score of the right shapes: two models that agree everywhere would have nothing to train on.

    top_k_of: the k of the scorings that `scoring.at` may name. Hidden states have one channel.
    """
    length = len(scoring.response_ids)
    return Score(
        -rng.uniform(0.1, 1.0, length).astype(np.float32),
        rng.uniform(0.1, 1.0, length).astype(np.float32),
        top=random_top(length, scoring.top_k, rng) if scoring.top_k else None,
        at_logprobs_TK=random_top(length, top_k_of[scoring.at], rng).logprobs_TK if scoring.at is not None else None,
        hidden_TH=torch.zeros(length, 1) if scoring.hidden else None,
        reverse_kl_T=rng.uniform(0.1, 1.0, length).astype(np.float32) if scoring.reverse_kl_to is not None else None,
    )


def random_top(length: int, k: int, rng: np.random.Generator) -> TopKArrays:
    """Return k tokens per position that have half of the probability together."""
    values = rng.uniform(0.1, 1.0, (length, k))
    logprobs = np.log(0.5 * values / values.sum(-1, keepdims=True)).astype(np.float32)
    return TopKArrays(np.broadcast_to(np.arange(k, dtype=np.int32), (length, k)), logprobs)
