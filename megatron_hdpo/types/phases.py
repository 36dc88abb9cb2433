"""Names of the phases of a run, as they are shown on the console, timed, and given deadlines."""

from __future__ import annotations

PHASES = (
    "imports",
    "join ranks",
    "build",
    "verify checkpoint",
    "health checks",
    "load data",
    "load model",
    "start engine",
    "prepare",
    "resume",
    "warm-up",
    "sync",
    "self-test",
    "rollout",
    "rollouts ahead",
    "score",
    "teacher",
    "reference",
    "train",
    "save",
    "evaluate",
    "write trace",
    "export",
    "sample",
    "report",
)
"""In about the order of a run; scoring of a step is `score`, `teacher` or `reference`, by whose weights score."""
