"""Runs one command and leaves none of its processes behind: python supervisor.py OWNER_PID GRACE_S COMMAND...

The supervisor ends, with everything the command started, when the command ends, on SIGTERM (the command gets GRACE_S
seconds to end by itself), on SIGINT (at once), or when the owner has died in any way. Standard library only: it starts
in milliseconds and needs little memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

POLL_S = 0.1
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None, use_errno=True)


class Supervisor:
    """Supervisor of one command, which becomes the leader of its own process group.

    owner: process id of the parent.
    """

    def __init__(self, owner: int, grace_s: float, command: list[str]) -> None:
        self.owner, self.grace_s = owner, grace_s
        self.deadline: float | None = None
        self.stop_requested = False
        for number, handler in ((signal.SIGTERM, self._on_terminate), (signal.SIGINT, self._on_interrupt)):
            signal.signal(number, handler)
        # Grandchildren become our children when their parent dies, so none escapes by leaving the group.
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_die_with_us)

    def run(self) -> int:
        """Return the exit code of the command, 128 + n when signal n ended it, once no process of it is left."""
        while self.process.poll() is None and not self._overdue():
            if self.stop_requested:
                self.process.terminate()
                self.stop_requested = False
            time.sleep(POLL_S)
        code = self.process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        _kill_descendants()
        code = -signal.SIGKILL if code is None else code
        return code if code >= 0 else 128 - code

    def _overdue(self) -> bool:
        return os.getppid() != self.owner or (self.deadline is not None and time.monotonic() >= self.deadline)

    def _on_terminate(self, _number: int, _frame: FrameType | None) -> None:
        if self.deadline is None:
            self.stop_requested, self.deadline = True, time.monotonic() + self.grace_s

    def _on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self.deadline = time.monotonic()


def _die_with_us() -> None:
    # The kernel kills the command if the supervisor is killed before it can act.
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_descendants() -> None:
    """Kill children until none is left; the orphans of each round are the children of the next."""
    while True:
        for child in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(POLL_S / 10)


def _children() -> list[int]:
    """Return the children of this process, read from /proc/<pid>/stat ("pid (name) state parent ...").

    Not every kernel lists the children of a process.
    """
    children = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", errors="replace") as file:
            if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                children.append(int(entry))
    return children


if __name__ == "__main__":
    sys.exit(Supervisor(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]).run())
