"""Counts of what happened to samples and servers since the last step, as metrics."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_hdpo.types.metrics import Metric


@dataclass
class Counts:
    """Counts of one rank's engine.

    failed_tries: requests for a sample that brought none. taken_out: servers that were found dead or hung. tripped:
    servers that got no samples for a while because they failed them. continued: samples that went on from the tokens of
    a request that ended early. kept_tokens: those tokens. lost_tokens: tokens that had arrived and were thrown away.
    """

    failed_tries: int = 0
    taken_out: int = 0
    tripped: int = 0
    continued: int = 0
    kept_tokens: int = 0
    lost_tokens: int = 0

    def take(self) -> dict[str, float]:
        """Return the counts as `servers/...` metrics, summed over ranks, and begin anew."""
        taken = {f"servers/{f.name}": Metric(getattr(self, f.name), "sum") for f in fields(self)}
        for f in fields(self):
            setattr(self, f.name, 0)
        return dict(taken)
