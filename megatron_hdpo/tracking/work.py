"""Useful floating-point operations of a rank's replica in a step."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hdpo.costs.flops import FORWARD_AND_BACKWARD, forward_flops
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.types.learning import Example, Scoring


class FlopCounter:
    """Counter of one replica's arithmetic, over the whole model, by true lengths: padding does not count."""

    def __init__(self) -> None:
        self.train_flops = self.score_flops = 0.0

    def trained(self, architecture: Architecture, examples: Sequence[Example]) -> None:
        """Count examples that went forward and backward, without inert ones."""
        sequences = [(e.num_tokens, len(e.response_ids)) for e in examples if not e.inert]
        self.train_flops += FORWARD_AND_BACKWARD * forward_flops(architecture, sequences)

    def scored(self, architecture: Architecture, scorings: Sequence[Scoring]) -> None:
        """Count scorings that went forward. architecture: of the model that scored."""
        sequences = [(len(s.context_ids) + len(s.response_ids), len(s.response_ids)) for s in scorings]
        self.score_flops += forward_flops(architecture, sequences)

    def take(self) -> tuple[float, float]:
        """Return (training, scoring) since the last call."""
        taken = self.train_flops, self.score_flops
        self.train_flops = self.score_flops = 0.0
        return taken
