"""Protocol of the rollout engines: the embedded one, and SGLang servers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from megatron_hdpo.types.rollouts import GenerationRequest, GenerationResult

WeightStream = Iterable[tuple[str, torch.Tensor]]


class EngineLostWeights(RuntimeError):
    """No server has the run's weights any more.

    Outstanding requests are dropped; they can be submitted again after a weight update.
    """


class Engine(Protocol):
    """Samples responses with the weights it was last given (`weight_sync.py` gives them).

    Requests are added by `submit` at any time, also while results are read. `results` yields what has finished until no
    request is outstanding: a request's n samples together or in several parts, each sample once. A sample that failed
    is returned as an error, never as a shorter or an empty completion.
    """

    @property
    def deterministic(self) -> bool:
        """Return whether equal requests with equal seeds and weights give equal completions."""

    @property
    def slots(self) -> int:
        """Most samples that are generated at once; further ones wait."""

    @property
    def weight_version(self) -> int:
        """Version of the weights of the last completed update; -1 before the first."""

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests.

        Raises ValueError, before anything is sampled, on a request that the engine cannot serve (empty prompt, id
        outside the vocabulary, prompt plus response longer than the context, k > vocabulary).
        """

    def results(self) -> Iterator[GenerationResult | None]:
        """Yield what has finished, in order of completion, until nothing is outstanding.

        None means that nothing has finished yet: the caller may act (submit, cancel) and then continue. Raises
        EngineLostWeights when no server has the run's weights any more.
        """

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Cancel the unfinished samples of these requests; `results` returns them as cancelled.

        Unknown and finished requests are ignored.
        """

    def metrics(self) -> dict[str, float]:
        """Return what has happened to this rank's samples and servers since the last call."""

    def make_room(self) -> None:
        """Free memory that a trainer on the same device can use, until the next weight update.

        Call it on every rank, and only when no request is outstanding and none will be submitted before that update.
        """

    def close(self) -> None:
        """Release memory, processes and ports. Idempotent."""
