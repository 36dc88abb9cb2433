"""Request that a run ends early, made by a signal: a user's Ctrl-C, or a scheduler's warning before its time limit.

The first signal is a request: the step in progress is finished or dropped, and a checkpoint is saved. A second Ctrl-C
ends the process at once. So does any signal while a run is being set up, when there is nothing to save.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


class StopRequested(Exception):
    """What was in progress is dropped because the run was asked to end; nothing has failed."""


class StopRequest:
    """Request that this run ends early, made on this rank or, by `ask`, on another one.

    at_once: called, in a thread, with a signal that is to end the process now, and with whether training had begun.
    has_job_failed: whether another rank has failed; then SIGTERM is torchrun's, and there is nothing to wait for.
    """

    def __init__(
        self,
        at_once: Callable[[signal.Signals, bool], object] = lambda number, has_begun: None,
        has_job_failed: Callable[[], bool] = lambda: False,
    ) -> None:
        self.reason = ""
        self._at_once, self._has_job_failed = at_once, has_job_failed
        self._say: Callable[[str], object] | None = None
        self._has_begun = False
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self.reason)

    def check(self) -> None:
        """Raise StopRequested if the run was asked to end."""
        if self.reason:
            raise StopRequested(self.reason)

    def ask(self, reason: str) -> None:
        """Ask the run to end, for `reason`, such as "SIGUSR1 on node3"; only the first reason counts."""
        with self._lock:
            say = self._say
            if self.reason or say is None:
                return
            self.reason = reason
        say(f"{reason}: the run ends after this step, or drops it, and saves a checkpoint")

    @contextmanager
    def accepted(self, say: Callable[[str], object]) -> Iterator[None]:
        """Take signals as requests while the block runs, Ctrl-C too. say: gets one line about the request."""
        self._say, self._has_begun = say, True
        handler = signal.signal(signal.SIGINT, _noted) if _in_main_thread() else None
        try:
            yield
        finally:
            self._say = None
            if handler is not None:
                signal.signal(signal.SIGINT, handler)

    def take(self, number: signal.Signals) -> None:
        """Take a signal that this process was sent.

        Schedulers repeat their signals, and kill what does not end: only Ctrl-C has another meaning the second time.
        """
        is_interrupt = number == signal.SIGINT
        if self._say is None:
            if not is_interrupt:  # outside of `accepted`, Ctrl-C is Python's KeyboardInterrupt
                self._at_once(number, self._has_begun)
        elif number == signal.SIGTERM and self._has_job_failed():
            self._at_once(number, True)
        elif not self.reason:
            self.ask(f"{number.name} on {socket.gethostname()}")
        elif is_interrupt:
            self._at_once(number, True)


@contextmanager
def signals_taken(request: StopRequest) -> Iterator[None]:
    """Give each signal that this process is sent to `request`, also while the main thread waits in a collective.

    Python calls its handlers in the main thread only, between two bytecodes. But C code writes each signal's number to
    a socket at once, and a thread reads it there. In another thread than the main one, signals stay as they are.
    """
    if not _in_main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    handlers = {number: signal.signal(number, _noted) for number in SIGNALS if number != signal.SIGINT}
    os.register_at_fork(after_in_child=_leave_signals_to_parent)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_read, args=(reader, request), daemon=True, name="signals").start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        writer.close()


def end_with_agent() -> None:
    """Let the system kill this rank when the torchrun agent that started it has died.

    An agent that is killed tells its ranks nothing, and they would go on to train beside those of the next attempt.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    agent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != agent:
        os.kill(os.getpid(), signal.SIGKILL)


def _read(reader: socket.socket, request: StopRequest) -> None:
    with reader:
        while numbers := reader.recv(64):
            for number in numbers:
                if number in SIGNALS:
                    request.take(signal.Signals(number))


def _noted(_number: int, _frame: object) -> None:
    """Do nothing: a signal with a Python handler neither ends the process nor is lost; the thread takes it."""


def _leave_signals_to_parent() -> None:
    """Ignore the signals in a forked child, such as a writer of checkpoints, which ends when its work is done.

    torchrun sends signals to a rank's whole process group, and the child has inherited handlers and socket.
    """
    taken = [number for number in SIGNALS if signal.getsignal(number) is _noted]
    for number in taken:
        signal.signal(number, signal.SIG_IGN)
    if taken:
        signal.set_wakeup_fd(-1)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
