"""The CPU cores of this process, on every system."""

from __future__ import annotations

import os


def usable_cores() -> list[int]:
    """Return the ids of the cores that this process may run on: all of them where the system has no such limit."""
    if hasattr(os, "sched_getaffinity"):  # Linux; macOS has no limit per process
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
