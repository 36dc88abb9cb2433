"""The standard metrics: name, label and format. One table for console and report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Headline:
    """A metric that every run shows. short: console column; label: report; spec: format of its value."""

    name: str
    short: str
    label: str
    spec: str


HEADLINES = (
    Headline("rollout/reward_mean", "reward", "Mean reward", ".3f"),
    Headline("rollout/cliff_rate", "cliffs", "Cliff rate (share of prompts)", ".3f"),
    Headline("privileged/success_rate", "priv.", "Privileged success rate", ".3f"),
    Headline("distill/tokens", "tokens", "Tokens distilled per step", ",.0f"),
    Headline("distill/divergence", "diverg.", "Divergence to the teacher (nats per token)", ".4f"),
    Headline("distill/covered_mass", "cover", "Student mass on the teacher's top-k", ".3f"),
    Headline("train/grad_norm", "grad", "Gradient norm", ".3g"),
    Headline("train/entropy", "entropy", "Policy entropy (nats per token)", ".3f"),
    Headline("ranks/slowest_ratio", "slowest", "Slowest rank's forward and backward, over the median", ".2f"),
    Headline("ranks/wait_share", "wait", "Share of forward and backward that ranks wait for the slowest", ".1%"),
)

STEP_SECONDS = "time/step_s"
"""Wall seconds of the whole step; the other `time/<phase>_s` are parts of it."""

_PASS_AT = re.compile(r"eval/(?:(?P<set>.+)/)?pass@(?P<k>\d+)")
_PHASE = re.compile(r"time/(?P<phase>.+)_s")


def parse_pass_at(name: str) -> tuple[str, int] | None:
    """Return ("", 4) for `eval/pass@4`, ("gsm", 4) for `eval/gsm/pass@4`, None for any other metric."""
    match = _PASS_AT.fullmatch(name)
    return None if match is None else (match["set"] or "", int(match["k"]))


def parse_phase(name: str) -> str | None:
    """Return "rollout" for `time/rollout_s`; None for any other metric, and for the step's total."""
    match = _PHASE.fullmatch(name)
    return None if match is None or name == STEP_SECONDS else match["phase"]


def step_seconds(metrics: Mapping[str, float | None]) -> float | None:
    """Return the seconds of one step: `time/step_s`, else the sum of its phases; None when neither was measured."""
    if metrics.get(STEP_SECONDS) is not None:
        return metrics[STEP_SECONDS]
    phases = [value for name, value in metrics.items() if parse_phase(name) and value is not None]
    return sum(phases) if phases else None
