"""What goes into an engine, what comes out of it, and what a judged rollout is.

Token data are numpy arrays on the host: they cross process boundaries, are written to disk and are packed into
micro-batches later. Response token ids are never detokenised and tokenised again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from megatron_hdpo.types.problem import Problem

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled.

    Log-probs are those of log_softmax(logits / temperature) over the full vocabulary, before top-p and top-k.
    temperature 0 is greedy decoding; its log-probs are those of temperature 1.
    top_logprobs: the k largest log-probs returned for every generated token (0: none).
    routed_experts: return the experts that every token was sent to; a completion without them is an error.
    """

    max_new_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    top_logprobs: int = 0
    stop_token_ids: tuple[int, ...] = ()
    routed_experts: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """`sampling.n` completions of one prompt. `seed` fixes them where the engine can (see Engine.deterministic).

    affinity: requests that share it begin alike, so that one server's prefix cache serves them all.
    """

    request_id: str
    prompt_ids: np.ndarray  # int32 [P]
    sampling: SamplingParams
    seed: int = 0
    affinity: str = ""


@dataclass(frozen=True)
class TopLogprobs:
    """The engine's k most likely tokens at each generated position: int32 [T, k] and float32 [T, k]."""

    ids_TK: np.ndarray
    logprobs_TK: np.ndarray


@dataclass(frozen=True)
class Completion:
    """One sampled response. The stop token that was sampled is its last token; a response cut by length has none.

    routed_experts: numbers of the experts in every layer for the prompt's and the response's tokens but the last, which
    the engine did not run; uint8, or uint16 for more than 256 experts.
    """

    token_ids: np.ndarray  # int32 [T]
    logprobs: np.ndarray  # float32 [T]
    finish_reason: FinishReason
    weight_versions: np.ndarray  # int32 [T], version of the weights that sampled each token
    top_logprobs: TopLogprobs | None = None
    routed_experts: np.ndarray | None = None  # [P + T - 1, layers, experts per token]


@dataclass(frozen=True)
class GenerationResult:
    """What came of one request, or of some of its n samples: `completions` that succeeded, one error text for each that
    did not, and how many were given up because they were cancelled."""

    request_id: str
    completions: list[Completion]
    errors: list[str] = field(default_factory=list)
    cancelled: int = 0


@dataclass
class Sample:
    """A completion after judging: its text, its reward and what the task says of it. Samples whose generation or check
    failed do not exist."""

    completion: Completion
    text: str
    reward: float
    feedback: str | None = None

    @property
    def length(self) -> int:
        """Number of response tokens, the stop token included."""
        return len(self.completion.token_ids)


@dataclass
class Group:
    """All rollouts of one problem in one step.

    samples answer `prompt_ids`; privileged samples answer `privileged_prompt_ids`, which hold the ground truth.
    dropped counts, by reason, what was asked for and is not here (`generation_failed`, `check_failed`, `duplicate`,
    `leaked`, `wrong`, ...).
    """

    problem: Problem
    prompt_ids: np.ndarray  # int32 [P]
    samples: list[Sample]
    privileged_prompt_ids: np.ndarray | None = None
    privileged: list[Sample] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
