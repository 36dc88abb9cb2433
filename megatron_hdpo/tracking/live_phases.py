"""The open phases at the bottom of a terminal, with bars that fill its width."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from megatron_hdpo.tracking.phase import Phase


class LivePhases:
    """Live view of the open phases, below a line about the whole run; it leaves no trace.

    status: returns that line. phases: returns the open phases, outer ones first.
    """

    def __init__(self, console: RichConsole, status: Callable[[], str], phases: Callable[[], Sequence[Phase]]) -> None:
        self._console, self._status, self._phases = console, status, phases
        self._spinner = Spinner("dots")
        self._live: Live | None = None

    def refresh(self) -> None:
        """Show the view while a phase is open, and remove it when none is."""
        if self._phases() and self._live is None:
            self._live = Live(console=self._console, get_renderable=self._render, transient=True, refresh_per_second=4)
            self._live.start()
        elif not self._phases() and self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self) -> RenderableType:
        columns = (
            Column(),
            Column(no_wrap=True),
            Column(ratio=1),
            Column(no_wrap=True, overflow="ellipsis"),
        )
        phases = self._phases()
        table = Table.grid(*columns, padding=(0, 1), expand=True)
        for depth, phase in enumerate(phases):
            table.add_row(self._spinner, Text("  " * depth + phase.name), _bar(phase), Text(phase.amounts()))
        states = [_one_line(phase.state) for phase in phases if phase.state]
        return Group(_one_line(self._status()), table, *states)


def _one_line(text: str) -> Text:
    return Text(text, style="dim", no_wrap=True, overflow="ellipsis")


def _bar(phase: Phase) -> ProgressBar:
    return ProgressBar(total=phase.total, completed=phase.shown, pulse=phase.total is None)
