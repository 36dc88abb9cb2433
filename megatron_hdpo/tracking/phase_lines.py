"""Lines about phases that last, for a log: none about short ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_hdpo.tracking.formats import duration
from megatron_hdpo.tracking.phase import Phase


@dataclass(frozen=True)
class Patience:
    """Seconds before something is said about a phase: that it runs, and at its end that it has ended."""

    running: float
    ended: float


class PhaseLines:
    """Lines about running and ended phases, written when they are due.

    say: prints a line. every_s: seconds between two lines about a running phase, and before the first. While the run
    starts, a phase has a line every 2 seconds, after 20 seconds every 10, so that a log shows that it lives. Later a
    phase has one at its end if it took 10 seconds.
    """

    def __init__(self, say: Callable[[str], None], every_s: float) -> None:
        self._say, self._every_s = say, every_s
        self._starting = True
        self.patience = Patience(min(2.0, every_s), min(2.0, every_s))
        self._said: dict[Phase, float] = {}
        self._last_error: BaseException | None = None

    def started(self) -> None:
        """Print fewer lines from now on, because the run has started."""
        self._starting = False
        self.patience = Patience(self._every_s, min(10.0, self._every_s))

    def tick(self, phase: Phase) -> None:
        """Print how far the phase is, if a line about it is due."""
        said = self._said.get(phase)
        if phase.elapsed >= (self.patience.running if said is None else said + self._pause_s(said)):
            self._said[phase] = phase.elapsed
            self._say(f"{phase.name}: {phase.progress()}")

    def _pause_s(self, said: float) -> float:
        """Return the seconds to the next line about a phase whose last line was `said` seconds after its begin."""
        if not self._starting:
            return self._every_s
        return min(self._every_s, 2.0 if said < 20 else 10.0)

    def end(self, phase: Phase, error: BaseException | None) -> None:
        """Print how the phase ended, if it took long, has a line already, or failed.

        An error is printed for the innermost phase only.
        """
        mentioned = self._said.pop(phase, None) is not None
        if error is not None:
            if error is self._last_error:
                return
            self._last_error = error
            how = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
            cause = "" if isinstance(error, KeyboardInterrupt) else f" by {type(error).__name__}"
            self._say(f"{phase.name}: {how} after {duration(phase.elapsed)}{cause}")
        elif mentioned or phase.elapsed >= self.patience.ended:
            self._say(f"{phase.name}: {phase.summary()}")
