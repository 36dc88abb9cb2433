"""Heartbeat of a rank: a thread tells the job's store what the rank does, and finds the rank that keeps all waiting.

It goes through the store, not through collectives, which hang with the rank that is late. Requests to end a run spread
in the same way.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from traceback import StackSummary

import torch.distributed as dist

from megatron_hdpo.parallel.late import COLLECTIVE, MEETING, Beat, Patience, verdict
from megatron_hdpo.parallel.main_thread import main_thread_stack, place, waits_for_ranks
from megatron_hdpo.parallel.stop_request import StopRequest

LOGGER = logging.getLogger(__name__)
_STOP, _VERDICT = "stop", "verdict"
End = Callable[[str], object]


def go_on(_verdict: str) -> None:
    """Do nothing about a verdict: the process goes on, until a meeting or a collective fails."""


class Heartbeat:
    """Beats of one of `size` ranks, in keys of `store` that are theirs alone; `start` begins them.

    store: with a client of its own: one that waits for a key does nothing else meanwhile. groups: process groups whose
    calls are counted. end: called with the verdict on ranks that are late, in the thread, on every rank that is not at
    a meeting; it ends the process. progress: returns what this rank does and how far it is; a text that changes is a
    sign of life. phase: returns the phase of the run. report: gets a line on the ranks that are late from time to time,
    by default the log. stop: of this run; a request on one rank reaches those of all ranks within two beats.
    wake: called with the verdict before `end`; returns whether the main thread will raise it itself.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        patience: Patience,
        groups: Sequence[dist.ProcessGroup] = (),
        end: End = go_on,
    ) -> None:
        self.rank, self.size, self.patience = rank, size, patience
        self.progress: Callable[[], str] = str
        self.phase: Callable[[], str] = str
        self.report: Callable[[str], None] = LOGGER.info
        self.stop = StopRequest()
        self.end = end
        self.wake: Callable[[str], bool] = lambda verdict: False
        self.arrived, self.waits_for, self.waits_since = 0, "", 0.0
        self._store, self._groups = store, groups
        self._begun = self._changed = time.monotonic()
        self._own = Beat(socket.gethostname())
        self._work: object = None
        self._seen: dict[int, tuple[int, float]] = {}
        self._looked = self._said = 0.0
        self._stop_told = False
        self._closed = threading.Event()
        self._beating = threading.Lock()

    def start(self) -> None:
        """Beat from now on."""
        self.beat()
        threading.Thread(target=self._run, daemon=True, name="rank-beats").start()

    @property
    def is_closed(self) -> bool:
        """Return whether the beats have ended in peace."""
        return self._closed.is_set()

    def close(self) -> None:
        """End the beats: this rank is not late from now on. Idempotent."""
        if not self._closed.is_set():
            self._closed.set()
            self._groups = ()  # each keeps threads of its own
            with suppress(RuntimeError):  # the store may have ended before
                self._write(left=True)

    def beat(self) -> None:
        """Tell the store what this rank does."""
        self._write()

    def doing(self) -> str:
        """Return what this rank does and how far it is."""
        progress = self.progress() or "nothing"
        return f"{progress}, waits for '{self.waits_for}'" if self.waits_for else progress

    def beats_of(self, ranks: Sequence[int]) -> list[Beat]:
        """Return the last beats of ranks that have begun to beat."""
        return [Beat(**json.loads(text)) for text in self._store.multi_get([_beat(rank) for rank in ranks])]

    def give_up(self, verdict: str) -> None:
        """End the run on every rank; only the first verdict counts."""
        self._store.compare_set(_VERDICT, "", verdict)

    def verdict(self, within_s: float = 0.0) -> str:
        """Return the verdict on ranks that are late or have ended; "" if there is none after so many seconds."""
        deadline = time.monotonic() + within_s
        with suppress(RuntimeError):  # the store has ended, and the job with it
            while not self._store.check([_VERDICT]):
                if time.monotonic() > deadline:
                    return ""
                time.sleep(0.05)
            return self._store.get(_VERDICT).decode()
        return ""

    def _run(self) -> None:
        """Beat, take note of what other ranks have found, and look at their beats while this rank stands still."""
        with suppress(dist.DistError):  # the store has ended, and the job with it
            while not self._closed.wait(self.patience.beat_s):
                self.beat()
                self._share_stop()
                if self._stands_still() and time.monotonic() - self._looked >= self.patience.look_s(self.size):
                    self._look()
                if found := self.verdict():
                    return self._obey(found)

    def _write(self, left: bool = False) -> None:
        stack = main_thread_stack()
        with self._beating:
            own = self._now(stack)
            work = (own.arrived, own.phase, own.doing, own.collectives)
            if work != self._work:
                self._work, self._changed = work, time.monotonic()
            own = replace(own, count=self._own.count + 1, still_s=time.monotonic() - self._changed, left=left)
            self._own = own
            self._store.set(_beat(self.rank), json.dumps(asdict(own)))

    def _now(self, stack: StackSummary) -> Beat:
        waits = MEETING if self.waits_for else COLLECTIVE if waits_for_ranks(stack) else ""
        # torch's stubs lack the number of a group's calls.
        calls = {str(g.group_name): g._get_sequence_number_for_group() for g in self._groups}  # type: ignore[attr-defined]
        return replace(
            self._own,
            arrived=self.arrived,
            waits=waits,
            phase=self.phase(),
            doing=self.doing(),
            at="" if self.waits_for else place(stack),
            collectives=calls,
        )

    def _share_stop(self) -> None:
        """Tell other ranks of a request to stop, or learn of theirs."""
        if self.stop and not self._stop_told:
            self._store.set(_STOP, self.stop.reason)
            self._stop_told = True
        elif not self.stop and self._store.check([_STOP]):
            self.stop.ask(self._store.get(_STOP).decode())

    def _stands_still(self) -> bool:
        return bool(self.waits_for) or self._own.still_s >= 2 * self.patience.beat_s

    def _look(self) -> None:
        """Read the beats of all ranks; give late ones up, or report on those that this rank waits for."""
        self._looked = now = time.monotonic()
        keys = [_beat(rank) for rank in range(self.size)]
        if not self._store.check(keys):
            return self._look_for_absent(now)
        beats = self.beats_of(range(self.size))
        for rank, beat in enumerate(beats):
            if self._seen.get(rank, (-1, now))[0] != beat.count:
                self._seen[rank] = (beat.count, now)
        silent_s = [now - self._seen[rank][1] for rank in range(self.size)]
        if found := verdict(beats, silent_s, self.patience):
            self.give_up(found)
        elif self.waits_for and now - max(self._said, self.waits_since) >= self.patience.say_s:
            self._report(beats)

    def _look_for_absent(self, now: float) -> None:
        """Give up ranks that have never beaten."""
        if now - self._begun <= self.patience.process_s:
            return
        absent = [rank for rank in range(self.size) if not self._store.check([_beat(rank)])]
        named = ", ".join(str(rank) for rank in absent[:8]) + (" ..." if len(absent) > 8 else "")
        self.give_up(
            f"{len(absent)} of {self.size} ranks have not joined for {self.patience.process_s:.0f} s "
            f"(parallel.timeout_minutes): {named}; look for their processes, and at the logs of torchrun"
        )

    def _report(self, beats: Sequence[Beat]) -> None:
        """Report what some of the ranks do that have not arrived where this one waits."""
        late = [(rank, beat) for rank, beat in enumerate(beats) if beat.arrived < self.arrived]
        if late:
            more = f", and {len(late) - 3} more" if len(late) > 3 else ""
            doing = "; ".join(f"rank {rank} on {beat.host}: {beat.doing}" for rank, beat in late[:3])
            self.report(f"waiting for '{self.waits_for}': {doing}{more}")
            self._said = self._looked

    def _obey(self, found: str) -> None:
        """End this rank, once others have had the time to learn of the verdict: torchrun ends them with the first."""
        LOGGER.info("%s", found)
        LOGGER.info("the main thread when that was found:\n%s", "".join(main_thread_stack().format()))
        if not self.wake(found) and not self._closed.wait(self.patience.beat_s):
            self.end(found)


def _beat(rank: int) -> str:
    return f"beat/{rank}"
