"""Meetings of all ranks, outside of collectives: the work before one may take hours, as long as it makes progress.

A collective has one deadline for everything: a rank that samples for an hour looks like one that hangs. So ranks first
meet at a key of the job's store. The heartbeat of each rank (`heartbeat.py`) tells what it does meanwhile; the end of
its process is seen at once, by a connection that is open for nothing else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist

from megatron_hdpo.parallel.heartbeat import End, Heartbeat, go_on
from megatron_hdpo.parallel.late import Patience, last_words
from megatron_hdpo.types.errors import UserError

_ALL_HERE = "all ranks are here"
_NO_DEADLINE = timedelta(days=20)
"""Milliseconds of a wait are 32 bits in torch's store."""
_NAMED_WITHIN_S = 5.0
"""Seconds that the neighbour of a rank that has ended gets to say so."""
_TAG = 7_117
"""Of the messages that say that a rank ends in peace; no other message between two ranks has it."""


class RankError(UserError, RuntimeError):
    """A rank that others wait for has ended, or makes no progress; the message names it, and its last progress."""


class Meetings:
    """Meetings of the ranks of a group; every rank calls `meet` at the same places of the program.

    store: of the job. group: a gloo group of all ranks. patience: with ranks that are late. groups: process groups
    whose calls the heartbeat counts. end: ends this process when a rank is late and this one is at no meeting.
    heartbeat: of this rank; it beats from now on where there are other ranks. Collective.
    """

    def __init__(
        self,
        store: dist.Store,
        group: dist.ProcessGroup,
        patience: Patience,
        groups: Sequence[dist.ProcessGroup] = (),
        end: End = go_on,
    ) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._group = group
        self._passed = 0
        self._farewell: dist.Work | None = None  # kept: a message whose handle is gone may not be sent
        if self.size == 1:
            self.heartbeat = Heartbeat(store, 0, 1, patience, groups, end)
            return
        # A name of its own: the store of a restarted job may hold the keys of the attempt before.
        box = [uuid4().hex]
        dist.broadcast_object_list(box, group=group, group_src=0)
        # Two clients: a client that waits for a key does nothing else meanwhile. torch's stubs lack `clone`.
        clients = [store.clone() for _ in range(2)]  # type: ignore[attr-defined]
        self._keys, self._beats = (dist.PrefixStore(f"meetings/{box[0]}", client) for client in clients)
        self.heartbeat = Heartbeat(self._beats, self.rank, self.size, patience, groups, end)
        self.heartbeat.wake = self._wake
        self.heartbeat.start()
        dist.barrier(group)  # now there is a beat of every rank
        ended = dist.irecv(torch.zeros(1), group=group, group_src=self._next, tag=_TAG)
        threading.Thread(target=self._watch_next, args=(ended,), daemon=True, name="next-rank").start()

    def meet(self, what: str) -> None:
        """Wait, however long it takes, until all ranks are here.

        what: the work that must be done before, for the message. Raises RankError on every rank that waits when a rank
        ends, or shows no progress for too long.
        """
        if self.size == 1:
            return
        heart = self.heartbeat
        heart.arrived, heart.waits_for, heart.waits_since = heart.arrived + 1, what, time.monotonic()
        try:
            heart.beat()  # nobody may take this rank for late any more
            verdict = self._verdict(heart.arrived)
        except dist.DistError as error:
            raise RankError(
                f"rank {self.rank} waited for '{what}', and the job's store has ended, with the rank or the agent that "
                f"keeps it: {str(error).splitlines()[0]}"
            ) from error
        self._passed, heart.waits_for = self._passed + 1, ""
        if verdict != _ALL_HERE:
            raise RankError(f"while ranks waited for '{what}': {verdict}")

    def close(self) -> None:
        """Stop watching, and tell the rank that watches this one that it ends in peace. Idempotent."""
        if self.size > 1 and not self.heartbeat.is_closed:
            self.heartbeat.close()
            self._farewell = dist.isend(
                torch.ones(1), group=self._group, group_dst=(self.rank - 1) % self.size, tag=_TAG
            )

    @contextmanager
    def naming_ranks(self) -> Iterator[None]:
        """Raise RankError in place of the error of a collective that failed because another rank is late or has ended.

        Connections to a rank that ends break on all others at once, and one of them names it.
        """
        try:
            yield
        except UserError:
            raise
        except RuntimeError as error:
            if self.size > 1 and (verdict := self.heartbeat.verdict(within_s=_NAMED_WITHIN_S)):
                raise RankError(verdict) from error
            raise

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

    def _wake(self, verdict: str) -> bool:
        """End the meeting that ranks are at, or go to next, with an error; return whether this rank is at one."""
        # Others may have passed the meeting whose end this rank has not noticed yet.
        for number in (self._passed + 1, self._passed + 2):
            self._beats.compare_set(_go(number), "", verdict)
        return bool(self.heartbeat.waits_for)

    @property
    def _next(self) -> int:
        """Return the rank whose end this rank notices: in a ring, somebody sees each of them."""
        return (self.rank + 1) % self.size

    def _watch_next(self, ended: dist.Work) -> None:
        """Wait for a message of the next rank, which comes when it closes, or for the end of the connection."""
        try:
            ended.wait(timedelta(days=3650))
        except RuntimeError as error:
            if self.heartbeat.is_closed or "imed out" in str(error) or "imeout" in str(error):
                return  # torch closes all connections of a group when a collective on it times out
            with suppress(dist.DistError):
                beat = self.heartbeat.beats_of([self._next])[0]
                own = f"rank {self.rank} is at: {self.heartbeat.doing()}"
                verdict = f"rank {self._next} on {beat.host} has ended; {last_words(self._next, beat)}; {own}"
                self.heartbeat.give_up(verdict)
                self._wake(verdict)


def _count(number: int) -> str:
    return f"{number}/arrived"


def _go(number: int) -> str:
    return f"{number}/go"
