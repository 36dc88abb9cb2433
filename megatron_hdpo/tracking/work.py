"""What a rank's replica ran through models in a step, in useful floating-point operations."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hdpo.costs.flops import FORWARD_AND_BACKWARD, forward_flops
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.types.learning import Example, Scoring


class StepWork:
    """Adds up the arithmetic of one replica, over the whole model, by true lengths: padding earns nothing."""

    def __init__(self) -> None:
        self.train_flops = self.score_flops = 0.0

    def trained(self, architecture: Architecture, examples: Sequence[Example]) -> None:
        """Examples went forward and backward, inert ones left out."""
        sequences = [(e.num_tokens, len(e.response_ids)) for e in examples if not e.inert]
        self.train_flops += FORWARD_AND_BACKWARD * forward_flops(architecture, sequences)

    def scored(self, architecture: Architecture, scorings: Sequence[Scoring]) -> None:
        """Scorings went forward. architecture: of the model that scored."""
        sequences = [(len(s.context_ids) + len(s.response_ids), len(s.response_ids)) for s in scorings]
        self.score_flops += forward_flops(architecture, sequences)

    def take(self) -> tuple[float, float]:
        """(training, scoring) since the last call."""
        taken = self.train_flops, self.score_flops
        self.train_flops = self.score_flops = 0.0
        return taken
