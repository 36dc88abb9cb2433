"""State of a request and of a sample in the embedded engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_hdpo.types.rollouts import Completion, FinishReason, GenerationRequest, GenerationResult, TopKArrays


@dataclass
class PendingRequest:
    """A request in progress; its samples end one by one.

    admitted: number of samples that have, or had, a slot.
    """

    request: GenerationRequest
    completions: dict[int, Completion] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    admitted: int = 0

    @property
    def finished(self) -> bool:
        """Return whether every sample has completed or failed."""
        return len(self.completions) + len(self.errors) == self.request.sampling.n

    def result(self) -> GenerationResult:
        """Return the samples and errors in the order of their indices."""
        return GenerationResult(
            request_id=self.request.request_id,
            completions=[self.completions[index] for index in sorted(self.completions)],
            errors=[self.errors[index] for index in sorted(self.errors)],
        )


@dataclass
class SequenceState:
    """One sample while it decodes.

    uniforms: float64 [max_new_tokens, 2]. cached: tokens in its slot, all but the last sampled one.
    """

    pending: PendingRequest
    index: int
    uniforms: np.ndarray
    cached: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    top_ids: list[np.ndarray] = field(default_factory=list)
    top_logprobs: list[np.ndarray] = field(default_factory=list)
    experts: list[np.ndarray] = field(default_factory=list)

    def completion(self, reason: FinishReason) -> Completion:
        """Return the sampled tokens as a Completion."""
        tops = None
        if self.top_ids:
            tops = TopKArrays(np.stack(self.top_ids), np.stack(self.top_logprobs))
        return Completion(
            token_ids=np.array(self.ids, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            finish_reason=reason,
            weight_versions=np.array(self.versions, dtype=np.int32),
            top_logprobs=tops,
            routed_experts=np.concatenate(self.experts) if self.experts else None,
        )
