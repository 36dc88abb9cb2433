"""An engine without a model whose samples follow from request seed and index, and which fails where it is told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from megatron_hdpo.types.rollouts import Completion, GenerationRequest, GenerationResult

Fails = Callable[[GenerationRequest, int], bool]


class FakeEngine:
    """fails(request, index) says which samples do not come. Results come in another order than requests."""

    deterministic = True
    slots = 8

    def __init__(self, fails: Fails = lambda request, index: False, vocabulary: int = 50) -> None:
        self.fails, self.vocabulary = fails, vocabulary
        self.seen: list[GenerationRequest] = []
        self._waiting: list[GenerationRequest] = []
        self.weight_version = 0

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        self.seen.extend(requests)
        self._waiting.extend(requests)

    def results(self) -> Iterator[GenerationResult]:
        while self._waiting:
            yield self._result(self._waiting.pop())

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Nothing is ever under way: results come when they are asked for."""

    def metrics(self) -> dict[str, float]:
        return {}

    def make_room(self) -> None:
        """It takes none."""

    def close(self) -> None:
        self._waiting.clear()

    def _result(self, request: GenerationRequest) -> GenerationResult:
        failed = [index for index in range(request.sampling.n) if self.fails(request, index)]
        came = [self._completion(request, i) for i in range(request.sampling.n) if i not in failed]
        return GenerationResult(request.request_id, came, [f"sample {index}: out of luck" for index in failed])

    def _completion(self, request: GenerationRequest, index: int) -> Completion:
        random = np.random.default_rng([request.seed % 2**32, index, *request.prompt_ids.tolist()])
        ids = random.integers(0, self.vocabulary, size=random.integers(1, 6)).astype(np.int32)
        logprobs = -random.random(len(ids)).astype(np.float32)
        return Completion(ids, logprobs, "stop", np.full(len(ids), self.weight_version, dtype=np.int32))
