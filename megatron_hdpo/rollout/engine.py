"""The protocol that every rollout engine keeps: the embedded one, and SGLang servers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_hdpo.types.rollouts import GenerationRequest, GenerationResult

WeightStream = Iterable[tuple[str, torch.Tensor]]


class EngineLostWeights(RuntimeError):
    """No server has the run's weights any more. What was outstanding is dropped; after an update it can be submitted
    again.
    """


@dataclass(frozen=True)
class EngineHealth:
    """alive: requests can be served now. detail: one line for a person, the reason when not alive."""

    alive: bool
    weight_version: int
    detail: str = ""


class Engine(Protocol):
    """Samples responses with the weights it was last given (how they come to it: see weight_sync.py).

    Requests go in by `submit`, at any time, also while results are read; `results` yields what has finished, until
    nothing submitted is left: a request's n samples together or in several parts, each sample once. A sample that
    failed comes back as an error, never as a shorter or an empty completion.
    """

    deterministic: bool
    """Whether equal requests with equal seeds and weights give equal completions."""

    @property
    def weight_version(self) -> int:
        """Version of the weights of the last completed update; -1 before the first."""

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests. Raises ValueError, before anything is sampled, on a request that the engine cannot serve
        (empty prompt, id outside the vocabulary, prompt plus response longer than the context, k > vocabulary).
        """

    def results(self) -> Iterator[GenerationResult | None]:
        """What has finished, in order of completion, until nothing is outstanding. None means that nothing has just
        now: the caller may act (submit, cancel) and goes on.
        """

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Give up what is unfinished of these requests; it comes back by `results` as cancelled. Unknown and finished
        ones are ignored.
        """

    def make_room(self) -> None:
        """Nothing is outstanding, and nothing will be asked before the next weight update: memory that a trainer on the
        same device could use may be given up until then.
        """

    def health(self) -> EngineHealth:
        """Whether requests can be served now; never raises."""

    def close(self) -> None:
        """Give back memory, processes and ports. Idempotent."""
