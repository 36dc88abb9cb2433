"""Run commands, log their output, and never be silent: for set-up and quickstart, with Python's own modules only.

A command's output is written to a log file. A line that matters is printed at once; any other line becomes the state
that the status shows. On a terminal the status is the last line, rewritten in place; elsewhere it is a new line
whenever nothing was printed for a while.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

try:
    import psutil
except ImportError:  # set-up has not installed it yet, and what it runs has no such descendants
    psutil = None

INTERRUPTED = 130
SHOWN_OF_A_FAILURE = 20
_SILENCE_S = 1.0
_POLL_S = 0.2
_LAST_WORDS_S = 3.0
_STATE_CHARACTERS = 90
_LOWER_PRIORITY = ("nice", "-n", "5")
_PATIENCE_S = 35.0  # torchrun itself waits 30 s for its ranks before it kills them


class PartFailed(RuntimeError):
    """A command ended with an error; the message names it and has the last lines that it printed."""


class Screen:
    """Output for a person: lines that stay, and a status that shows that something still runs.

    silence_s: seconds without output after which a stream that is no terminal gets the status as a line.
    """

    def __init__(self, stream: TextIO | None = None, silence_s: float = _SILENCE_S) -> None:
        self.stream = sys.stdout if stream is None else stream
        self._live = self.stream.isatty()
        self._silence_s = silence_s
        self._last = time.monotonic()
        self._lock = threading.Lock()

    def line(self, text: str = "") -> None:
        """Print a line that stays."""
        with self._lock:
            self._write(("\r\x1b[K" if self._live else "") + text + "\n")

    def status(self, text: str) -> None:
        """Show what runs now: at once on a terminal, elsewhere only when nothing was printed for a while."""
        with self._lock:
            if self._live:
                width = os.get_terminal_size(self.stream.fileno()).columns - 1
                self._write("\r\x1b[K" + text[:width])
            elif time.monotonic() - self._last >= self._silence_s:
                self._write(text + "\n")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
        self._last = time.monotonic()


@dataclass
class Part:
    """A command with a name for people.

    matters: whether a line of its output is printed. environment: variables in addition to those of this process.
    latest: the last line that was not printed; `run` sets it.
    """

    name: str
    command: Sequence[str | Path]
    log: Path
    matters: Callable[[str], bool] = lambda line: True
    environment: Mapping[str, str] = field(default_factory=dict)
    latest: str = ""


def run(screen: Screen, *parts: Part, on_tick: Callable[[], None] = lambda: None) -> float:
    """Run the commands in parallel and wait for all of them; return the seconds it took.

    on_tick: called several times per second. Raises PartFailed when one ends with an error. All commands are stopped
    when one of them fails or this process is interrupted.
    """
    began = time.monotonic()
    lines: queue.Queue[tuple[Part, str]] = queue.Queue()
    running: list[_Running] = []
    try:
        running += [_Running(part, lines) for part in parts]
        while not all(command.done for command in running) or not lines.empty():
            _take(screen, lines)
            on_tick()
            states = " | ".join(f"{part.name}: {part.latest}" if part.latest else part.name for part in parts)
            screen.status(f"  {states} ({time.monotonic() - began:.0f} s)")
            for command in running:
                command.raise_failure()
        on_tick()
    finally:
        _stop(running, screen)
    return time.monotonic() - began


def interrupt_on_signals() -> None:
    """Let SIGTERM and SIGHUP (a closed terminal) stop this process with a KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), interrupt)


class _Running:
    """A command that was started, and the thread that reads its output."""

    def __init__(self, part: Part, lines: queue.Queue[tuple[Part, str]]) -> None:
        self.part, self._lines = part, lines
        self._ended: float | None = None
        part.log.parent.mkdir(parents=True, exist_ok=True)
        # In its own session: Ctrl-C on the terminal reaches only this process, which then stops the command.
        # With a lower priority: a command that keeps every core busy must not keep this process from speaking.
        self.process = subprocess.Popen(
            [*_LOWER_PRIORITY, *(str(word) for word in part.command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1", **part.environment},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.part.log.open("a", encoding="utf-8") as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                self._lines.put((self.part, line.rstrip()))

    @property
    def done(self) -> bool:
        """Whether the command has ended and all its output is in the log."""
        if self.process.poll() is None:
            return False
        self._ended = self._ended or time.monotonic()
        # A child that outlives the command may keep its output open; do not wait for that.
        return not self._reader.is_alive() or time.monotonic() - self._ended > _LAST_WORDS_S

    def raise_failure(self) -> None:
        """Raise PartFailed when the command has ended with an error."""
        if self.done and (code := self.process.returncode):
            log = self.part.log
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_OF_A_FAILURE:]
            shown = "\n".join(f"  {line}" for line in last)
            raise PartFailed(f"{self.part.name} failed with exit code {code}:\n{shown}\nfull output: {log}")

    def signal(self, number: int) -> None:
        """Send a signal to the command and its children, if it still runs."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


def _take(screen: Screen, lines: queue.Queue[tuple[Part, str]]) -> None:
    """Print or store the lines that have arrived, waiting a little for the first one."""
    try:
        part, line = lines.get(timeout=_POLL_S)
        while True:
            if part.matters(line):
                screen.line(line)
            elif line:
                part.latest = line if len(line) <= _STATE_CHARACTERS else line[:_STATE_CHARACTERS] + " ..."
            part, line = lines.get_nowait()
    except queue.Empty:
        return


def _stop(running: Sequence[_Running], screen: Screen) -> None:
    """Stop what still runs: SIGTERM to each command, then SIGKILL to what remains, its descendants too."""
    began = time.monotonic()
    descendants = [child for command in running for child in _descendants(command.process)]
    for command in running:
        command.signal(signal.SIGTERM)
    while any(command.process.poll() is None for command in running):
        if time.monotonic() - began > _PATIENCE_S:
            for command in running:
                command.signal(signal.SIGKILL)
        screen.status("  stopping ...")
        time.sleep(_POLL_S)
    for child in descendants:
        with suppress(psutil.Error):
            child.kill()


def _descendants(process: subprocess.Popen[str]) -> list[Any]:
    """Return the descendants of a running process.

    They must be killed one by one: ranks have sessions of their own, and their workers ignore SIGTERM and outlive them.
    """
    if psutil is None or process.poll() is not None:
        return []
    with suppress(psutil.Error):
        return psutil.Process(process.pid).children(recursive=True)
    return []
