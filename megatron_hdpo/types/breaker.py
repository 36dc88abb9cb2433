"""Circuit breaker of one server: takes a server that fails its samples out of use, and tries it again later."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

FAILURES = 3
"""Different samples that fail in a row before a server gets no more. One sample alone may be what is wrong."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0


class Breaker:
    """Counts the failures of one server's samples.

    state: `closed` while the server may have as many samples as fit; `open` while it gets none; `half_open` while it
    gets one at a time, after it has answered a trial. reason: the failure that opened it. The pause before a trial
    doubles each time, up to a minute, until a sample succeeds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.state: Literal["closed", "open", "half_open"] = "closed"
        self.reason = ""
        self._clock = clock
        self._failed: set[str] = set()
        self._pause_s = FIRST_PAUSE_S
        self._opened_at = 0.0

    @property
    def due(self) -> bool:
        """Return whether the pause of an open breaker is over, so that the server may be tried."""
        return self.state == "open" and self._clock() - self._opened_at >= self._pause_s

    def fail(self, sample: str, reason: str) -> bool:
        """Count a failure of a sample; return whether it took a server out that was well before."""
        self._failed.add(sample)
        if self.state == "half_open":
            self.stay_open()
            return False
        if self.state == "open" or len(self._failed) < FAILURES:
            return False
        self.state, self.reason, self._opened_at = "open", reason, self._clock()
        return True

    def stay_open(self) -> None:
        """Begin another, longer pause: a trial has failed."""
        self.state, self._opened_at = "open", self._clock()
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def succeed(self) -> bool:
        """Forget all failures, because a sample succeeded; return whether the server was out of rotation."""
        was_out = self.state != "closed"
        self.state, self.reason, self._pause_s = "closed", "", FIRST_PAUSE_S
        self._failed.clear()
        return was_out
