"""Readers of answers that fail: for tests of what the engine survives."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_hdpo.rewards.worker import Outcome
from megatron_hdpo.rollout.sglang.answers import Asked
from megatron_hdpo.rollout.sglang.reading import RawAnswer, read_in_worker


@dataclass(frozen=True)
class FailsFirst:
    """Fails in the first `times` calls, then reads.

    notes: file with the process id of each call. how: `exit`, `segfault`, `hang`, or `late` (reads after a second).
    """

    notes: Path
    how: str
    times: int = 1

    def __call__(self, answer: RawAnswer, asked: Asked) -> Outcome:
        with self.notes.open("a") as file:
            print(os.getpid(), file=file)
        if len(self.calls()) <= self.times:
            getattr(self, self.how)()
        return read_in_worker(answer, asked)

    def calls(self) -> list[int]:
        """Process ids of the calls so far."""
        return [int(line) for line in self.notes.read_text().split()] if self.notes.exists() else []

    def exit(self) -> None:
        os._exit(1)

    def segfault(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def hang(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3600)

    def late(self) -> None:
        time.sleep(1)
