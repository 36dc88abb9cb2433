"""Output for people during a run: live bars on a terminal, few lines elsewhere, one row of numbers per step.

Only rank 0 gets an enabled console; on the other ranks every call is silent (phases are still timed). Everything but
final tables also goes to the log file of rank 0.
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

from rich.box import SIMPLE_HEAD
from rich.console import Console as RichConsole
from rich.markup import escape
from rich.table import Table

from megatron_hdpo.tracking.evaluations import Measured, evaluation_lines, moment
from megatron_hdpo.tracking.live_phases import LivePhases
from megatron_hdpo.tracking.phase import Phase
from megatron_hdpo.tracking.phase_lines import PhaseLines
from megatron_hdpo.tracking.run_progress import RunProgress
from megatron_hdpo.tracking.step_table import StepTable
from megatron_hdpo.tracking.ticker import Ticker
from megatron_hdpo.tracking.timing import PhaseTimer
from megatron_hdpo.types.headline import Headline

SHOWN = "shown_on_console"
"""Attribute of log records that the console has printed already; the logging handler of rank 0 skips them."""

_HEADER_EVERY = 20
_TICK_S = 0.5
_ROW_WIDTH_OF_FILES = 80
_TABLE_WIDTH_OF_FILES = 140
_NUMBER = re.compile(r"-|nan|[+-]?(inf|[\d,]+(\.\d+)?(e[+-]?\d+)?%?)")
"""A table's cell that stands on the right; "-" is an absent number."""

_log = logging.getLogger("megatron_hdpo.console")
_log.addHandler(
    logging.NullHandler()
)  # without configure_logging, Python would print warnings of silent ranks to stderr


class Console:
    """Progress, step rows, evaluations, tables and warnings for people. Thread-safe.

    enabled: false on every rank but 0: nothing is printed. interactive: live bars; None: if `stream` is a terminal.
    progress_s: seconds between two lines about a long phase, in a log. timer: collects `time/<phase>_s`. tick_s: how
    often it is looked whether such a line is due; None: only when `tick` is called.
    """

    def __init__(
        self,
        enabled: bool,
        interactive: bool | None = None,
        *,
        stream: TextIO | None = None,
        progress_s: float = 60.0,
        timer: PhaseTimer | None = None,
        clock: Callable[[], float] = time.monotonic,
        tick_s: float | None = _TICK_S,
    ) -> None:
        stream = sys.stdout if stream is None else stream
        self.enabled = enabled
        self.interactive = enabled and (stream.isatty() if interactive is None else interactive)
        self.timer = PhaseTimer(clock) if timer is None else timer
        self.rich = _rich_console(stream, enabled, self.interactive)
        self.progress = RunProgress(clock)
        self._clock = clock
        self._lock = threading.RLock()
        self._open: list[Phase] = []
        self._lines = PhaseLines(self._about_phase, progress_s)
        self._live = LivePhases(self.rich, self.progress.text, lambda: tuple(self._open)) if self.interactive else None
        self._ticker = None if tick_s is None else Ticker(self.tick, tick_s)
        self._step = 0
        self._rows = 0
        self._header = ""
        self._warned: set[str] = set()

    @contextmanager
    def phase(self, name: str, total: float | None = None, unit: str = "item") -> Iterator[Phase]:
        """Show the block as a phase with its speed and remaining time, and time it.

        Phases may nest and follow each other. total: units to do, None where unknown, 0 where the block extends it.
        unit: singular. The seconds become `time/<name>_s` of `self.timer`.
        """
        phase, error = Phase(name, total, unit, self._clock), None
        with self.timer.measure(name):
            self._begin(phase)
            try:
                yield phase
            except BaseException as problem:
                error = problem
                raise
            finally:
                self._end(phase, error)

    def tick(self) -> None:
        """Print a line about the innermost phase if one is due."""
        with self._lock:
            if self._open:
                self._lines.tick(self._open[-1])

    def step(
        self, step: int, total: int, metrics: Mapping[str, float | None], headlines: Sequence[Headline] = ()
    ) -> None:
        """Print one row with the main numbers of a step, and a header before every 20 rows.

        headlines: the objective's, the most important first. The columns are explained once, before the first row.
        """
        with self._lock:
            self._lines.started()
            self.progress.step_done(step, total)
            table = StepTable(headlines, total, self.rich.width if self.interactive else _ROW_WIDTH_OF_FILES)
            if not self._header:
                self._say(table.legend, style="dim")
            if self._rows % _HEADER_EVERY == 0 or table.header != self._header:
                self._header = table.header
                self._say(self._header, style="bold")
            self._rows += 1
            self._say(table.row(step, metrics, self.progress.elapsed_s, self.progress.left_s))

    def evaluation(self, step: int, measured: Sequence[Measured]) -> None:
        """Print the shares of problems solved after a step, with intervals and the best so far; nothing without any."""
        if not measured:
            return
        with self._lock:
            self._say(f"evaluation {moment(step)}: {self.progress.times()}", "bold")
            for line in evaluation_lines(step, measured):
                self._say(line)
            self._rows = 0  # a header again before the next row

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
            self._say(text)

    def warn(self, message: str) -> None:
        """Print a warning on the console of rank 0 and write it to the log file of every rank, each message once."""
        with self._lock:
            if message in self._warned:
                return
            self._warned.add(message)
            _log.warning(message, extra={SHOWN: True})
            self._print(f"warning: {message}", style="yellow")

    def begin_step(self, step: int) -> None:
        """Take note that a step begins: `doing` names it from now on."""
        self._step = step

    def doing(self) -> str:
        """Return what the innermost phase of which step does and how far it is; "" between phases. On every rank."""
        with self._lock:
            step = f"step {self._step}, " if self._step else ""
            return step + self._open[-1].position() if self._open else ""

    def innermost(self) -> str:
        """Return the name of the innermost phase; "" between phases. On every rank."""
        with self._lock:
            return self._open[-1].name if self._open else ""

    def _begin(self, phase: Phase) -> None:
        with self._lock:
            self._open.append(phase)
            if not self.enabled:
                return
            if self._live is not None:
                self._live.refresh()
            if self._ticker is not None and len(self._open) == 1:
                self._ticker.start()

    def _end(self, phase: Phase, error: BaseException | None) -> None:
        with self._lock:
            self._open.remove(phase)
            if not self.enabled:
                return
            if self._live is not None:
                self._live.refresh()
            self._lines.end(phase, error)
            if self._ticker is not None and not self._open:
                self._ticker.stop()

    def _about_phase(self, text: str) -> None:
        if not self.interactive:  # a terminal shows a bar instead
            self._print(f"[{time.strftime('%H:%M:%S')}] {text}")
        _log.info(text, extra={SHOWN: True})

    def _say(self, text: str, style: str | None = None) -> None:
        """Print a line on the console of rank 0 and write it to its log file."""
        if self.enabled:
            self._print(text, style)
            _log.info(text, extra={SHOWN: True})

    def _print(self, text: str, style: str | None = None) -> None:
        # Text comes from models and data: never markup. A terminal breaks lines between words, a file keeps them whole.
        self.rich.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=not self.interactive)


def _table(title: str, rows: Sequence[Mapping[str, object]]) -> Table:
    table = Table(
        title=escape(title),
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
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


def _rich_console(stream: TextIO, enabled: bool, interactive: bool) -> RichConsole:
    # A log file has no width of its own; rich would assume 80 columns and break tables there.
    width = None if interactive else _TABLE_WIDTH_OF_FILES
    return RichConsole(file=stream, quiet=not enabled, force_terminal=interactive, width=width, highlight=False)
