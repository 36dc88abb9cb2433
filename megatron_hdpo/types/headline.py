"""Metrics that people follow during a run: their name, column heading, description and format."""

from __future__ import annotations

from dataclasses import dataclass

WIDEST_HEADING = 7
"""Characters of a heading at most: the console has columns of 8."""


@dataclass(frozen=True)
class Headline:
    """A metric that people follow.

    name: as in metrics.jsonl. short: heading of its console column, 7 characters at most. label: a description, for the
    legend and the report. spec: format of its value. Raises ValueError when the heading is too long.
    """

    name: str
    short: str
    label: str
    spec: str = ".3f"

    def __post_init__(self) -> None:
        if len(self.short) > WIDEST_HEADING:
            raise ValueError(f"headline {self.name}: {self.short!r} is longer than {WIDEST_HEADING} characters")


REWARD = Headline("rollout/reward_mean", "reward", "Mean reward")
RESPONSE_LENGTH = Headline("rollout/response_tokens", "length", "Mean response length (tokens)", ",.1f")
TRUNCATED = Headline("rollout/truncated_rate", "cut", "Share of responses cut at the length limit")
CLIFF_RATE = Headline("rollout/cliff_rate", "cliffs", "Cliff rate (share of prompts)")
SOLVED_RATE = Headline("rollout/solved_rate", "solved", "Share of prompts whose every response is right")
PRIVILEGED_SUCCESS = Headline("privileged/success_rate", "priv.", "Privileged success rate")
PRIVILEGED_KEPT = Headline("privileged/kept", "kept", "Privileged rollouts kept per step", ",.0f")
DISTILLED_TOKENS = Headline("distill/tokens", "tokens", "Tokens distilled per step", ",.0f")
DIVERGENCE = Headline("distill/divergence", "diverg.", "Divergence to the teacher (nats per token)", ".4f")
COVERED_MASS = Headline("distill/covered_mass", "cover", "Student mass on the teacher's top-k")
SURROGATE_LOSS = Headline("train/surrogate_loss", "loss", "Surrogate loss", ".4f")
NLL = Headline("train/nll", "nll", "Negative log-likelihood of trained tokens (nats per token)")
ENTROPY = Headline("train/entropy", "entropy", "Policy entropy on own tokens that ran (nats per token)")
DISTILLED_ENTROPY = Headline("distill/entropy", "entropy", "Policy entropy on distilled tokens (nats per token)")
CLIP_FRACTION = Headline("train/clip_fraction", "clip", "Share of tokens whose ratio is clipped")
REFERENCE_KL = Headline("train/reference_kl", "ref. KL", "Divergence from the reference (nats per token)", ".4f")
GRADIENT_NORM = Headline("train/grad_norm", "grad", "Gradient norm", ".3g")
LEARNING_RATE = Headline("train/lr", "lr", "Learning rate", ".2g")
