"""Beginnings of samples that outlive the loss of an engine's last server, for the requests that sample them anew."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from megatron_hdpo.types.rollouts import Completion, GenerationRequest


class Beginnings:
    """Holds beginnings by what was requested.

    seeded: the servers are deterministic, so that a beginning belongs to one seed.
    """

    def __init__(self, seeded: bool) -> None:
        self.seeded = seeded
        self._held: dict[Hashable, list[Completion]] = {}

    def put(self, request: GenerationRequest, index: int, beginning: Completion) -> None:
        """Hold the beginning of sample `index` of a request."""
        self._held.setdefault(self._key(request, index), []).append(beginning)

    def take(self, request: GenerationRequest, index: int) -> Completion | None:
        """Return a beginning for sample `index` of a request like the one that it comes from, and forget it."""
        held = self._held.get(self._key(request, index))
        return held.pop() if held else None

    def clear(self) -> int:
        """Forget all beginnings; return the number of their tokens."""
        tokens = sum(len(beginning.token_ids) for held in self._held.values() for beginning in held)
        self._held.clear()
        return tokens

    def _key(self, request: GenerationRequest, index: int) -> Hashable:
        seed = request.seed + index if self.seeded else None
        return request.affinity, request.prompt_ids.tobytes(), replace(request.sampling, n=1), seed
