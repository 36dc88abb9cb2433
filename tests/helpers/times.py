"""How long tests take: seconds of each folder and the slowest tests at the end of a run, and as JSON on request."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

SLOWEST = 20


def seconds_per_test(reports: Iterable[Any]) -> dict[str, float]:
    """Return the seconds of each test, set-up and tear-down included, by node id."""
    seconds: Counter[str] = Counter()
    for report in reports:
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid] += report.duration
    return dict(seconds)


def seconds_per_folder(seconds: dict[str, float]) -> dict[str, tuple[int, float]]:
    """Return the number of tests and their seconds by folder, the longest first."""
    found: dict[str, tuple[int, float]] = {}
    for name, value in seconds.items():
        folder = str(Path(name.partition("::")[0]).parent)
        count, total = found.get(folder, (0, 0.0))
        found[folder] = count + 1, total + value
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def write_summary(terminal: Any, path: Path | None) -> None:
    """Print both tables, and write them to `path` with the outcomes and the machine."""
    seconds = seconds_per_test(report for reports in terminal.stats.values() for report in reports)
    folders = seconds_per_folder(seconds)
    slowest = sorted(seconds.items(), key=lambda item: -item[1])[:SLOWEST]
    terminal.section("seconds per folder")
    for folder, (count, total) in folders.items():
        terminal.write_line(f"{total:9.1f}  {count:5d} tests  {folder}")
    terminal.section(f"slowest {len(slowest)} tests")
    for name, value in slowest:
        terminal.write_line(f"{value:9.1f}  {name}")
    if path is not None:
        outcomes = {kind: len(terminal.stats.get(kind, [])) for kind in ("passed", "failed", "error", "skipped")}
        told = {
            "outcomes": outcomes,
            "machine": {"system": platform.system(), "architecture": platform.machine(), "cpu": cpu_model()},
            "python": platform.python_version(),
            "megatron_core": importlib.metadata.version("megatron-core"),
            "seconds_per_folder": {folder: round(total, 1) for folder, (_, total) in folders.items()},
            "slowest": {name: round(value, 1) for name, value in slowest},
        }
        path.write_text(json.dumps(told, indent=1) + "\n")


def cpu_model() -> str:
    """Return the processor's name, and those of its instruction sets that decide how fast bfloat16 is."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in values.get("flags", "").split()]
    return f"{values.get('model name', platform.processor())} ({', '.join(flags)})"
