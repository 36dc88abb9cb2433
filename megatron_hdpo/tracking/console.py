"""Output for people during a run: bars on a terminal, dated lines in a log file, one row of numbers per step.

Only rank 0 gets an enabled console; on the other ranks every call is silent (phases are still timed).
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from megatron_hdpo.tracking.formats import duration, number, speed
from megatron_hdpo.tracking.names import HEADLINES, step_seconds
from megatron_hdpo.tracking.timing import PhaseTimer

SHOWN = "shown_on_console"
"""Attribute of log records that the console has printed already; the logging handler of rank 0 skips them."""

_HEADER_EVERY = 20
_STEP_METRICS = (
    "rollout/reward_mean",
    "rollout/cliff_rate",
    "privileged/success_rate",
    "distill/tokens",
    "distill/divergence",
    "train/grad_norm",
)
_COLUMNS = tuple(headline for name in _STEP_METRICS for headline in HEADLINES if headline.name == name)
_COLUMN_WIDTH = 9
_NUMBER = re.compile(r"-|nan|[+-]?(inf|[\d,]+(\.\d+)?(e[+-]?\d+)?%?)")
"""A table's cell that stands on the right; "-" is an absent number."""

_log = logging.getLogger("megatron_hdpo.console")
_log.addHandler(
    logging.NullHandler()
)  # without configure_logging, Python would print warnings of silent ranks to stderr


class Phase:
    """A running phase with its progress and speed. `Console.phase` makes it."""

    def __init__(self, name: str, total: float | None, unit: str, clock: Callable[[], float]) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done: float = 0
        self._clock, self._start = clock, clock()
        self._lock = threading.Lock()
        self._show: Callable[[Phase], None] = lambda phase: None

    def advance(self, n: float = 1) -> None:
        """Count n more units as done. May be called from any thread."""
        with self._lock:
            self.done += n
        self._show(self)

    @property
    def elapsed(self) -> float:
        """Return the seconds since the phase began."""
        return self._clock() - self._start

    def progress_text(self) -> str:
        """Return `512/2,048 tok (25 %), 170 tok/s, 9 s to go`, or as much of it as can be computed."""
        if self.total is None and not self.done:
            return ""
        amount = number(self.done) if self.total is None else f"{number(self.done)}/{number(self.total)}"
        parts = [f"{amount} {self.unit}"]
        if self.total:
            parts[0] += f" ({100 * self.done / self.total:.0f} %)"
        rate = self.done / self.elapsed if self.elapsed > 0 else 0.0
        if rate > 0:
            parts.append(speed(rate, self.unit))
            if self.total is not None and self.total > self.done:
                parts.append(f"{duration((self.total - self.done) / rate)} to go")
        return ", ".join(parts)


class Console:
    """Progress, step rows, tables and warnings for people. Thread-safe.

    enabled: false on every rank but 0: nothing is printed. interactive: live bars; None: if `stream` is a terminal.
    interval_s: shortest time between two progress lines of a phase in a log file. timer: collects `time/<phase>_s`.
    """

    def __init__(
        self,
        enabled: bool,
        interactive: bool | None = None,
        *,
        stream: TextIO | None = None,
        interval_s: float = 5.0,
        timer: PhaseTimer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = sys.stdout if stream is None else stream
        self.enabled = enabled
        self.interactive = enabled and (stream.isatty() if interactive is None else interactive)
        self.timer = PhaseTimer(clock) if timer is None else timer
        self.rich = _rich_console(stream, enabled, self.interactive)
        self._interval, self._clock = interval_s, clock
        self._lock = threading.RLock()
        self._progress: Progress | None = None
        self._open_phases = 0
        self._rows = 0
        self._said: set[str] = set()

    @contextmanager
    def phase(self, name: str, total: float | None = None, unit: str = "it") -> Iterator[Phase]:
        """Show the block as a phase with its speed and remaining time, and time it.

        Phases may nest and follow each other. total: units to do, None where unknown. The seconds become
        `time/<name>_s` of `self.timer`.
        """
        with self.timer.measure(name):
            phase = Phase(name, total, unit, self._clock)
            view = self._bar if self.interactive else self._lines
            with view(phase):
                yield phase

    @contextmanager
    def _bar(self, phase: Phase) -> Iterator[None]:
        progress, task = self._add_bar(phase)
        phase._show = lambda p: progress.update(task, completed=p.done, total=p.total, text=p.progress_text())
        try:
            yield
        finally:
            self._remove_bar(progress, task)

    def _add_bar(self, phase: Phase) -> tuple[Progress, TaskID]:
        with self._lock:
            # One live display holds the bars of all open phases: rich allows only one per terminal.
            if self._progress is None:
                self._progress = _progress(self.rich)
                self._progress.start()
            self._open_phases += 1
            name = escape("  " * (self._open_phases - 1) + phase.name)
            return self._progress, self._progress.add_task(name, total=phase.total, text="")

    def _remove_bar(self, progress: Progress, task: TaskID) -> None:
        with self._lock:
            progress.remove_task(task)
            self._open_phases -= 1
            if self._open_phases == 0:
                progress.stop()
                self._progress = None

    @contextmanager
    def _lines(self, phase: Phase) -> Iterator[None]:
        target = "" if phase.total is None else f": {number(phase.total)} {phase.unit}"
        self._line(f"{phase.name}{target} ...")
        last = [self._clock()]

        def show(running: Phase) -> None:
            with self._lock:
                if self._clock() - last[0] >= self._interval:
                    last[0] = self._clock()
                    self._line(f"{running.name}: {running.progress_text()}")

        phase._show = show
        try:
            yield
        except BaseException as error:
            self._line(f"{phase.name}: stopped after {duration(phase.elapsed)} by {type(error).__name__}")
            raise
        self._line(f"{phase.name}: {_summary(phase)}")

    def step(self, step: int, total: int, metrics: Mapping[str, float | None]) -> None:
        """Print one row with the main numbers of a step, and a header before every 20 rows. Absent numbers are `-`."""
        width = max(4, 2 * len(str(total)) + 1)
        cells = [_cell(metrics.get(column.name), column.spec) for column in _COLUMNS]
        cells.append(_cell(step_seconds(metrics), ".1f"))
        with self._lock:
            if self._rows % _HEADER_EVERY == 0:
                self._print(_row("step", [column.short for column in _COLUMNS] + ["seconds"], width), style="bold")
            self._rows += 1
            self._print(_row(f"{step}/{total}", cells, width))

    def table(self, title: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Print a table with the keys of the first row as columns; without rows, only the title."""
        with self._lock:
            if not rows:
                self._print(f"{title}: nothing to show")
                return
            self.rich.print(_table(title, rows))

    def print(self, text: str) -> None:
        """Print a plain line."""
        with self._lock:
            self._print(text)

    def warn(self, message: str) -> None:
        """Print a warning on the console of rank 0 and write it to the log file of every rank."""
        _log.warning(message, extra={SHOWN: True})
        with self._lock:
            self._print(f"warning: {message}", style="yellow")

    def once(self, message: str) -> None:
        """Call `warn` for the first occurrence only."""
        with self._lock:
            if message in self._said:
                return
            self._said.add(message)
        self.warn(message)

    def _line(self, text: str) -> None:
        with self._lock:
            self._print(f"[{time.strftime('%H:%M:%S')}] {text}")

    def _print(self, text: str, style: str | None = None) -> None:
        # Text comes from models and data: never markup, never cut to the width of a log file.
        self.rich.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _summary(phase: Phase) -> str:
    amount = f"{number(phase.done)} {phase.unit} in " if phase.done else "done in "
    rate = f", {speed(phase.done / phase.elapsed, phase.unit)}" if phase.done and phase.elapsed > 0 else ""
    return f"{amount}{duration(phase.elapsed)}{rate}"


def _cell(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _row(first: str, cells: Sequence[str], width: int) -> str:
    return first.rjust(width) + "".join(cell.rjust(_COLUMN_WIDTH) for cell in cells)


def _table(title: str, rows: Sequence[Mapping[str, object]]) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for key in rows[0]:
        numeric = all(_NUMBER.fullmatch(_text(row.get(key))) for row in rows)
        table.add_column(escape(str(key)), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(escape(_text(row.get(key))) for key in rows[0]))
    return table


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _progress(console: RichConsole) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
    )
    return Progress(*columns, console=console, transient=True, refresh_per_second=4)


def _rich_console(stream: TextIO, enabled: bool, interactive: bool) -> RichConsole:
    # A log file has no width of its own; rich would assume 80 columns and break tables there.
    width = None if interactive else 140
    return RichConsole(file=stream, quiet=not enabled, force_terminal=interactive, width=width, highlight=False)
