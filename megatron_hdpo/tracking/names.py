"""Names of metrics: those of the report, seconds of phases, and shares of problems solved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from megatron_hdpo.types.headline import (
    CLIFF_RATE,
    COVERED_MASS,
    DISTILLED_ENTROPY,
    DISTILLED_TOKENS,
    DIVERGENCE,
    ENTROPY,
    GRADIENT_NORM,
    PRIVILEGED_SUCCESS,
    REWARD,
    Headline,
)

HEADLINES = (
    REWARD,
    CLIFF_RATE,
    PRIVILEGED_SUCCESS,
    DISTILLED_TOKENS,
    DIVERGENCE,
    COVERED_MASS,
    GRADIENT_NORM,
    ENTROPY,
    DISTILLED_ENTROPY,
    Headline("ranks/slowest_ratio", "slowest", "Slowest rank's forward and backward, over the median", ".2f"),
    Headline("ranks/wait_share", "wait", "Share of forward and backward that ranks wait for the slowest", ".1%"),
)
"""Metrics that the report shows of every run."""


class ServerMetric(NamedTuple):
    """A metric of SGLang servers. label: a description, for the report. spec: format of its value."""

    name: str
    label: str
    spec: str = ",.0f"


SERVERS = "servers/all"
"""Number of SGLang servers; a step without it had none."""

SERVER_USE = (
    ServerMetric(SERVERS, "Servers"),
    ServerMetric("servers/in_use", "Servers in use after the rollouts", ",.1f"),
    ServerMetric("servers/running", "Requests at work", ",.1f"),
    ServerMetric("servers/waiting", "Samples that wait for a server", ",.1f"),
    ServerMetric("servers/queued", "Requests that wait within a server", ",.1f"),
    ServerMetric("servers/cache_hit_rate", "Share of prompt tokens from the prefix cache", ".1%"),
    ServerMetric("servers/tokens_per_s", "Tokens per second, while servers sample"),
    ServerMetric("servers/asleep_s", "Seconds asleep", ",.1f"),
)
"""What the report shows of servers, as values of a step."""

SERVER_TROUBLE = (
    ServerMetric("servers/failed_tries", "Requests that brought no sample"),
    ServerMetric("servers/continued", "Samples that went on elsewhere"),
    ServerMetric("servers/kept_tokens", "Tokens that they had and kept"),
    ServerMetric("servers/lost_tokens", "Tokens thrown away"),
    ServerMetric("servers/tripped", "Servers that failed one sample after another"),
    ServerMetric("servers/taken_out", "Servers found dead or hung"),
    ServerMetric("servers/restarts", "Restarts of servers"),
    ServerMetric("rollout/generation_failed", "Student rollouts lost"),
    ServerMetric("rollout/privileged_generation_failed", "Privileged rollouts lost"),
)
"""What the report shows of servers, as counts over all steps."""

STEP_SECONDS = "time/step_s"
"""Wall seconds of the whole step; the other `time/<phase>_s` are parts of it."""

_PASS_AT = re.compile(r"eval/(?:(?P<set>.+)/)?pass@(?P<k>\d+)")
_GREEDY = re.compile(r"eval/(?P<set>.+)/greedy")
_ACCURACY = re.compile(r"eval/(?P<set>.+)/accuracy/(?P<part>(?:level|source)-.+?)")
_OF_A_RATE = ("_low", "_high", "_problems")
_PHASE = re.compile(r"time/(?P<phase>.+)_s")


def parse_pass_at(name: str) -> tuple[str, int] | None:
    """Return ("", 4) for `eval/pass@4`, ("gsm", 4) for `eval/gsm/pass@4`, None for any other metric."""
    match = _PASS_AT.fullmatch(name)
    return None if match is None else (match["set"] or "", int(match["k"]))


def parse_share(name: str) -> tuple[str, str] | None:
    """Return ("gsm", "pass@4") for `eval/gsm/pass@4`, ("gsm", "greedy") for `eval/gsm/greedy`, else None."""
    if (parsed := parse_pass_at(name)) is not None:
        return parsed[0], f"pass@{parsed[1]}"
    match = _GREEDY.fullmatch(name)
    return None if match is None else (match["set"], "greedy")


def parse_accuracy(name: str) -> tuple[str, str] | None:
    """Return ("gsm", "level-2") for `eval/gsm/accuracy/level-2`; None for any other metric, and for its interval."""
    match = None if name.endswith(_OF_A_RATE) else _ACCURACY.fullmatch(name)
    return None if match is None else (match["set"], match["part"])


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
