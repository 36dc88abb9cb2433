"""Requests to an engine, its completions, and judged rollouts in groups.

Token data are numpy arrays on the host: they cross process boundaries, are written to disk and are packed into
micro-batches later. Response token ids are never decoded and encoded again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np

from megatron_hdpo.types.problem import Problem

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    Log-probs are those of log_softmax(logits / temperature) over the full vocabulary, before top-p and top-k.
    temperature 0 is greedy decoding; its log-probs are those of temperature 1.
    top_logprobs: the k largest log-probs returned for every generated token (0: none).
    routed_experts: return the experts of every token; a completion without them is an error.
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
    """Request for `sampling.n` completions of one prompt.

    seed: fixes the completions if the engine is deterministic (Engine.deterministic). affinity: requests with the same
    value share a prefix, so they should go to the same server and its prefix cache.
    """

    request_id: str
    prompt_ids: np.ndarray  # int32 [P]
    sampling: SamplingParams
    seed: int = 0
    affinity: str = ""


@dataclass(frozen=True)
class TopKArrays:
    """Ids, int32 [T, k], and log-probs, float32 [T, k], of the k most likely tokens at each response position."""

    ids_TK: np.ndarray
    logprobs_TK: np.ndarray


@dataclass(frozen=True)
class Completion:
    """Sampled response. The sampled stop token is its last token; a response cut at the length limit has none.

    routed_experts: expert ids in every layer for all prompt and response tokens but the last one, which the engine did
    not run; uint8, or uint16 for more than 256 experts.

    Of a completion that came from another rank (`sampling.delivery`), logprobs and weight_versions are empty and
    top_logprobs is None on a rank that computes no loss.
    """

    token_ids: np.ndarray  # int32 [T]
    logprobs: np.ndarray  # float32 [T]
    finish_reason: FinishReason
    weight_versions: np.ndarray  # int32 [T], version of the weights that sampled each token
    top_logprobs: TopKArrays | None = None
    routed_experts: np.ndarray | None = None  # [P + T - 1, layers, experts per token]


@dataclass(frozen=True)
class GenerationResult:
    """Result of one request, or of some of its n samples.

    completions: those that succeeded. errors: one text for each that failed. cancelled: number of those cancelled.
    """

    request_id: str
    completions: list[Completion]
    errors: list[str] = field(default_factory=list)
    cancelled: int = 0


@dataclass
class Sample:
    """Judged completion: its text, its reward and the feedback on it.

    components: where the reward is a weighted sum, the value of each reward function by its name. decided_by: name of
    the one that tells right from wrong; "": the reward itself does. If generation or the check failed, there is no
    sample.
    """

    completion: Completion
    text: str
    reward: float
    feedback: str | None = None
    components: Mapping[str, float] = field(default_factory=dict)
    decided_by: str = ""

    @property
    def correctness(self) -> float:
        """Return the value by which the response counts as right or wrong. Raises KeyError if it is not there."""
        return self.components[self.decided_by] if self.decided_by else self.reward

    @property
    def length(self) -> int:
        """Return the number of response tokens, the stop token included."""
        return len(self.completion.token_ids)

    @property
    def finish_reason(self) -> FinishReason:
        """Return why the response ended."""
        return self.completion.finish_reason


@dataclass
class Group:
    """Group of all rollouts of one problem in one step.

    samples answer `prompt_ids`; privileged samples answer `privileged_prompt_ids`, which hold the ground truth.
    dropped: number of samples that were requested and are missing, by reason (`generation_failed`, `check_failed`,
    `duplicate`, `leaked`, `wrong`, ...).
    """

    problem: Problem
    prompt_ids: np.ndarray  # int32 [P]
    samples: list[Sample]
    privileged_prompt_ids: np.ndarray | None = None
    privileged_samples: list[Sample] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)


class SampleOutline(NamedTuple):
    """Summary of a sample, some fifty bytes, that every rank has.

    versions: the oldest and the newest weights that sampled a token of it. version_sum, logprob_sum: sums over its
    tokens of the versions and of the log-probs. correctness, components: see `Sample`.
    """

    reward: float
    length: int
    finish_reason: FinishReason
    versions: tuple[int, int]
    version_sum: int
    logprob_sum: float
    correctness: float
    components: Mapping[str, float]


@dataclass(frozen=True)
class GroupOutline:
    """Summary of a group that every rank has: all of it but tokens and texts. Lengths are in tokens."""

    problem: Problem
    prompt_length: int
    samples: tuple[SampleOutline, ...]
    privileged_prompt_length: int = 0
    privileged_samples: tuple[SampleOutline, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)


class JudgedSample(Protocol):
    """What a `Sample` and its outline have in common."""

    @property
    def reward(self) -> float:
        """Return the reward, of which advantages are made."""

    @property
    def correctness(self) -> float:
        """Return the value that success thresholds are compared with: the reward, if nothing else was asked for."""

    @property
    def length(self) -> int:
        """Return the number of response tokens, the stop token included."""

    @property
    def finish_reason(self) -> FinishReason:
        """Return why the response ended."""


class JudgedGroup(Protocol):
    """What a `Group` and its outline have in common."""

    @property
    def problem(self) -> Problem:
        """Return the problem."""

    @property
    def samples(self) -> Sequence[JudgedSample]:
        """Return the samples of the student's prompt."""

    @property
    def privileged_samples(self) -> Sequence[JudgedSample]:
        """Return the samples of the privileged prompt."""

    @property
    def dropped(self) -> Mapping[str, int]:
        """Return the number of missing samples by reason."""


def outline_of(group: Group) -> GroupOutline:
    """Return the summary of a group."""
    return GroupOutline(
        problem=group.problem,
        prompt_length=len(group.prompt_ids),
        samples=tuple(map(_outline, group.samples)),
        privileged_prompt_length=0 if group.privileged_prompt_ids is None else len(group.privileged_prompt_ids),
        privileged_samples=tuple(map(_outline, group.privileged_samples)),
        dropped=dict(group.dropped),
    )


def _outline(sample: Sample) -> SampleOutline:
    completion = sample.completion
    versions = completion.weight_versions
    return SampleOutline(
        reward=sample.reward,
        length=sample.length,
        finish_reason=completion.finish_reason,
        versions=(int(versions.min()), int(versions.max())) if len(versions) else (0, 0),
        version_sum=int(versions.sum(dtype=np.int64)),
        logprob_sum=float(completion.logprobs.sum(dtype=np.float64)),
        correctness=sample.correctness,
        components=sample.components,
    )
