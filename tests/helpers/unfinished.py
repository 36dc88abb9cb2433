"""Which tests run now: their names, printed where the whole suite is stopped."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

import pytest


class Unfinished:
    """A pytest plugin that remembers the tests that began and did not end, and prints them in the summary."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._began[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._began.pop(nodeid, None)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self._began:
            return
        terminalreporter.section("tests that had not ended")
        for name, began in self._began.items():
            terminalreporter.write_line(f"{time.monotonic() - began:9.1f}  {name}")


def watch(config: pytest.Config) -> None:
    """Register the plugin, and let SIGTERM end the run as Ctrl-C does, summary included."""
    config.pluginmanager.register(Unfinished())
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
