"""Collective sync of the trainer's weights to every rank's engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from megatron_hdpo.model.policy import TrainingError
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.rollout.embedded import EmbeddedEngine
from megatron_hdpo.rollout.engine import WeightStream
from megatron_hdpo.rollout.sglang.weights.gate import GateError
from megatron_hdpo.rollout.sglang.weights.push import ForeignWeightsError, WeightPush, WeightPushError
from megatron_hdpo.types.metrics import reduce_metrics
from megatron_hdpo.weights.stream import Receivers

OpenStream = Callable[[Receivers], WeightStream]
PUSHES = 3
"""Tries of a push when no server of some rank took the weights; servers are restarted in between."""


class WeightSync(Protocol):
    """Sends the weights of a stream to every engine, stamped with `version`; returns metrics. Collective."""

    def __call__(self, open_stream: OpenStream, version: int) -> dict[str, float]: ...

    def close(self) -> None:
        """Release what the sync holds; no further call follows. Idempotent."""


@dataclass(frozen=True)
class EmbeddedSync:
    """Sync of embedded engines: every rank's engine takes every tensor."""

    engine: EmbeddedEngine

    def __call__(self, open_stream: OpenStream, version: int) -> dict[str, float]:
        """Load the weights into this rank's engine; see WeightSync."""
        self.engine.update_weights(open_stream("all"), version)
        return {}

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


@dataclass(frozen=True)
class ServerSync:
    """Sync of SGLang servers: ranks with servers push, the other ranks take part in gathering the tensors."""

    push: WeightPush
    receivers: Receivers
    context: ParallelContext

    def __call__(self, open_stream: OpenStream, version: int) -> dict[str, float]:
        """Push the weights to the servers of all ranks; see WeightSync.

        Raises, on every rank, TrainingError when a server does not hold the weights it was sent, when another run sends
        weights to it, or when no server of a rank took them; MemoryShortageError when a colocated server cannot take
        its memory back.
        """
        for last in (False,) * (PUSHES - 1) + (True,):
            metrics, failure, fatal = self._push(open_stream, version)
            self.context.barrier("weights in the servers")
            failures = [f for f in self.context.gather_objects((failure, fatal)) if f[0]]
            if not failures:
                return reduce_metrics(self.context.gather_objects(metrics))
            if last or any(is_fatal for _, is_fatal in failures):
                raise TrainingError("weight sync: " + "; ".join(text for text, _ in failures))
        raise AssertionError

    def close(self) -> None:
        """Leave the servers' process group, where there is one."""
        self.push.close()

    def _push(self, open_stream: OpenStream, version: int) -> tuple[dict[str, float], str, bool]:
        """Return (metrics, error, whether the error is fatal), with an empty error on success."""
        try:
            return self.push.push(open_stream(self.receivers), version).metrics(), "", False
        except WeightPushError as error:
            return {}, str(error), False
        except (GateError, ForeignWeightsError) as error:
            return {}, str(error), True
