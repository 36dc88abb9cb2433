"""The CPU cores that this process may use, on every operating system."""

from __future__ import annotations

import os


def usable_cores() -> list[int]:
    """Return the ids of the cores that this process may run on; all cores if the system has no limit per process."""
    if hasattr(os, "sched_getaffinity"):  # Linux; macOS has no limit per process
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
