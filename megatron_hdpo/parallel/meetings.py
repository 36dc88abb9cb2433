"""Meetings of all ranks, outside of collectives: the work before one may take hours, as long as it makes progress.

A collective has one deadline for everything: a rank that samples for an hour looks like one that hangs. So ranks first
meet at a key of the job's store, where each rank also leaves a beat every few seconds: what it is doing, and how far it
is. A rank that others wait for is given up when its beats stop, or when they repeat the same progress for too long; the
end of its process is seen at once, by a connection that is open for nothing else.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist

from megatron_hdpo.parallel.stop_request import StopRequest
from megatron_hdpo.types.errors import UserError

LOGGER = logging.getLogger(__name__)
BEAT_S, LOOK_S = 10.0, 30.0
"""Longest time between two beats of a rank, and between two looks of a waiting rank at those of the others."""
KEYS_PER_S = 16
"""Beats that one waiting rank reads per second at most: the looks of a thousand ranks must not load the store."""
SAY_S = 300.0
"""Seconds after which, and between which, a waiting rank reports for whom it waits."""
_ALL_HERE = "all ranks are here"
_STOP = "stop"
_NO_DEADLINE = timedelta(days=20)
"""Milliseconds of a wait are 32 bits in torch's store."""
_TAG = 7_117
"""Of the messages that say that a rank ends in peace; no other message between two ranks has it."""


class RankError(UserError, RuntimeError):
    """A rank that others wait for has ended, or makes no progress; the message names it, and its last progress."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself. count: of its beats. arrived: meetings at which it has arrived. doing: progress."""

    host: str
    count: int = 0
    arrived: int = 0
    doing: str = ""


@dataclass
class _Watched:
    """The last beat of a late rank, and since when its process, and its work, have shown nothing new."""

    beat: Beat
    same_beat_since: float
    same_work_since: float


@dataclass(frozen=True)
class Patience:
    """Seconds that ranks wait for one that shows no progress (`work_s`), and for one without beats (`process_s`).

    say_s: seconds between two reports on ranks that others wait for.
    """

    work_s: float
    process_s: float
    say_s: float = SAY_S

    @property
    def beat_s(self) -> float:
        """Return the seconds between two beats: many of them fit into a deadline."""
        return min(BEAT_S, self.work_s / 20, self.process_s / 20)

    def look_s(self, ranks: int) -> float:
        """Return the seconds between two looks at the beats of so many ranks."""
        return max(min(LOOK_S, self.work_s / 10, self.process_s / 10), ranks / KEYS_PER_S)


class Meetings:
    """Meetings of the ranks of a group; every rank calls `meet` at the same places of the program.

    store: of the job; each rank has its own client of it. group: a gloo group of all ranks. progress: returns what this
    rank does and how far it is, called in a thread; a text that changes is a sign of life. report: gets a line on the
    ranks that are late from time to time, by default the log. stop: of this run; a request on one rank reaches those of
    all ranks within two beats. Collective.
    """

    def __init__(self, store: dist.Store, group: dist.ProcessGroup, patience: Patience) -> None:
        self.rank, self.size, self.patience = group.rank(), group.size(), patience
        self.progress: Callable[[], str] = str
        self.report: Callable[[str], None] = LOGGER.info
        self.stop = StopRequest()
        self._stop_told = False
        self._group = group
        self._arrived = self._passed = 0
        self._waits_for, self._waits_since = "", 0.0
        self._watched: dict[int, _Watched] = {}
        self._watcher: threading.Thread | None = None
        self._closed = threading.Event()
        self._farewell: dist.Work | None = None  # kept: a message whose handle is gone may not be sent
        self._own = Beat(socket.gethostname())
        self._beating = threading.Lock()
        if self.size > 1:
            # A name of its own: the store of a restarted job may hold the keys of the attempt before.
            box = [uuid4().hex]
            dist.broadcast_object_list(box, group=group, group_src=0)
            # Two clients: a client that waits for a key does nothing else meanwhile. torch's stubs lack `clone`.
            clients = [store.clone() for _ in range(2)]  # type: ignore[attr-defined]
            self._keys, self._beats = (dist.PrefixStore(f"meetings/{box[0]}", client) for client in clients)
            self._beat()
            dist.barrier(group)  # now there is a beat of every rank

    def meet(self, what: str) -> None:
        """Wait, however long it takes, until all ranks are here.

        what: the work that must be done before, for the message. Raises RankError on every rank that waits when a rank
        ends, or shows no progress for too long.
        """
        if self.size == 1:
            return
        self._arrived, self._watched = self._arrived + 1, {}
        self._waits_for, self._waits_since = what, time.monotonic()
        self._start_watching()
        try:
            self._beat()  # nobody may take this rank for late any more
            verdict = self._verdict(self._arrived)
        except dist.DistError as error:
            raise RankError(
                f"rank {self.rank} waited for '{what}', and the job's store has ended, with the rank or the agent that "
                f"keeps it: {str(error).splitlines()[0]}"
            ) from error
        self._passed, self._waits_for = self._passed + 1, ""
        if verdict != _ALL_HERE:
            raise RankError(f"while ranks waited for '{what}': {verdict}")

    def close(self) -> None:
        """Stop watching, and tell the rank that watches this one that it ends in peace. Idempotent."""
        if self._watcher is not None and not self._closed.is_set():
            self._closed.set()
            self._farewell = dist.isend(
                torch.ones(1), group=self._group, group_dst=(self.rank - 1) % self.size, tag=_TAG
            )

    def _verdict(self, number: int) -> str:
        """Return the verdict on a meeting, once there is one; the last rank to arrive writes the good one."""
        go = _go(number)
        if self._keys.add(_count(number), 1) == self.size:
            self._keys.compare_set(go, "", _ALL_HERE)
            for key in (_count(number - 1), _go(number - 1)):  # every rank has left that meeting
                self._keys.delete_key(key)
        while True:
            with suppress(dist.DistStoreError):  # the wait's own deadline
                self._keys.wait([go], _NO_DEADLINE)
                return self._keys.get(go).decode()

    def _give_up(self, verdict: str) -> None:
        """End the meeting that ranks are at, or go to next, with an error."""
        LOGGER.info("%s", verdict)
        # Others may have passed the meeting whose end this rank has not noticed yet.
        for number in (self._passed + 1, self._passed + 2):
            self._beats.compare_set(_go(number), "", verdict)

    def _start_watching(self) -> None:
        """Start the two threads with the first meeting: a process group that never meets needs none."""
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, daemon=True, name="rank-beats")
            self._watcher.start()
            ended = dist.irecv(torch.zeros(1), group=self._group, group_src=self._next, tag=_TAG)
            threading.Thread(target=self._watch_next, args=(ended,), daemon=True, name="next-rank").start()

    @property
    def _next(self) -> int:
        """Return the rank whose end this rank notices: in a ring, somebody sees each of them."""
        return (self.rank + 1) % self.size

    def _watch_next(self, ended: dist.Work) -> None:
        """Wait for a message of the next rank, which comes when it closes, or for the end of the connection."""
        try:
            ended.wait(timedelta(days=3650))
        except RuntimeError as error:
            if self._closed.is_set() or "imed out" in str(error) or "imeout" in str(error):
                return  # torch closes all connections of a group when a collective on it times out
            with suppress(dist.DistError):
                beat = self._beats_of([self._next])[0]
                self._give_up(f"rank {self._next} on {beat.host} has ended; {_last(self._next, beat)}")

    def _watch(self) -> None:
        """Beat, and look at the beats of others while this rank waits for them."""
        looked, said, every_s = 0.0, 0.0, self.patience.look_s(self.size)
        with suppress(dist.DistError):  # the store has ended, and the job with it
            while not self._closed.wait(self.patience.beat_s):
                self._beat()
                self._share_stop()
                now, waits_for = time.monotonic(), self._waits_for
                if not waits_for or now - looked < every_s:
                    continue
                late, looked = self._look(), now
                if late and now - max(said, self._waits_since) >= self.patience.say_s:
                    self.report(f"waiting for '{waits_for}': {late}")
                    said = now

    def _beat(self) -> None:
        with self._beating:
            doing = f"waits for '{self._waits_for}'" if self._waits_for else self.progress()
            self._own = replace(self._own, count=self._own.count + 1, arrived=self._arrived, doing=doing)
            self._beats.set(_beat(self.rank), json.dumps(asdict(self._own)))

    def _share_stop(self) -> None:
        """Tell other ranks of a request to stop, or learn of theirs."""
        if self.stop and not self._stop_told:
            self._beats.set(_STOP, self.stop.reason)
            self._stop_told = True
        elif not self.stop and self._beats.check([_STOP]):
            self.stop.ask(self._beats.get(_STOP).decode())

    def _look(self) -> str:
        """Note what is new of the ranks that are late, and give up when there has been nothing for too long.

        Returns what some of them do.
        """
        arrived, watched = self._arrived, self._watched
        late = {r: b for r, b in enumerate(self._beats_of(range(self.size))) if b.arrived < arrived}
        now = time.monotonic()
        for rank, beat in late.items():
            seen = watched.setdefault(rank, _Watched(beat, now, now))
            if beat.count != seen.beat.count:
                seen.same_beat_since = now
            if (beat.arrived, beat.doing) != (seen.beat.arrived, seen.beat.doing):
                seen.same_work_since = now
            seen.beat = beat
            if problem := self._problem(rank, seen, now):
                self._give_up(f"{problem}; {_last(rank, beat)}")
        more = f", and {len(late) - 3} more" if len(late) > 3 else ""
        return "; ".join(f"rank {rank} on {beat.host}: {beat.doing}" for rank, beat in list(late.items())[:3]) + more

    def _problem(self, rank: int, seen: _Watched, now: float) -> str:
        """Return what is wrong with a late rank; "" while it may still come."""
        name = f"rank {rank} on {seen.beat.host}"
        if (silent_s := now - seen.same_beat_since) > self.patience.process_s:
            return f"{name} has given no sign of life for {_duration(silent_s)} (parallel.timeout_minutes)"
        if (silent_s := now - seen.same_work_since) > self.patience.work_s:
            return (
                f"{name} has made no progress for {_duration(silent_s)} (raise parallel.silence_minutes if its work "
                "may take longer without any)"
            )
        return ""

    def _beats_of(self, ranks: range | list[int]) -> list[Beat]:
        return [Beat(**json.loads(text)) for text in self._beats.multi_get([_beat(rank) for rank in ranks])]


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _count(number: int) -> str:
    return f"{number}/arrived"


def _go(number: int) -> str:
    return f"{number}/go"


def _last(rank: int, beat: Beat) -> str:
    return f"the last that it said: {beat.doing or 'nothing'}; see logs/rank_{rank:05d}.log in the run folder"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
