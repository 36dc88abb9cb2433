"""Sync of the policy's weights to the engine, and their restoration after an engine lost them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from megatron_hdpo.model.policy import Policy
from megatron_hdpo.rollout.weight_sync import WeightSync
from megatron_hdpo.weights.stream import Receivers, stream_hf


class PolicySync:
    """Streams the policy's weights into the engine. Every call is collective.

    policy: the trained model. weight_sync: sends a stream to every engine.
    """

    def __init__(self, policy: Policy, weight_sync: WeightSync) -> None:
        self.policy = policy
        self.weight_sync = weight_sync
        self._version = 0

    def __call__(self, version: int, norm_scale: float = 1.0) -> dict[str, float]:
        """Send the weights, stamped with `version`, and return metrics.

        norm_scale: multiplies the final norm, for the self-test. Raises TrainingError, on every rank, when the weights
        do not arrive.
        """
        self._version = version

        def open_stream(to: Receivers) -> Iterator[tuple[str, Tensor]]:
            stream = stream_hf(self.policy.model, self.policy.architecture, self.policy.context, to=to)
            return scaled_final_norm(stream, norm_scale)

        return self.weight_sync(open_stream, version)

    def restore(self) -> None:
        """Send the weights again, with the version of the last sync, to engines that lost them."""
        self(self._version)

    def close(self) -> None:
        """Release what the sync holds. Idempotent."""
        self.weight_sync.close()


def scaled_final_norm(stream: Iterable[tuple[str, Tensor]], scale: float) -> Iterator[tuple[str, Tensor]]:
    """Yield the stream with its final norm multiplied by `scale`, which changes every log-prob."""
    for name, tensor in stream:
        yield name, tensor * scale if name == "model.norm.weight" and scale != 1.0 else tensor
