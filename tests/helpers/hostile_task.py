"""A task whose scorer does as the response says: for tests of what the pool survives."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.task import TaskBase

PROBLEM = Problem(id="hostile/0", task="hostile", question="?", answer="!")


class Unpicklable(Exception):
    """An exception that no process can read back: its constructor wants more than it keeps."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


class HostileTask(TaskBase):
    """Scorers that misbehave; `prepare_error` makes the preparation fail."""

    prepare_error: bool = False

    def default_name(self) -> str:
        return "hostile"

    def problems(self, report: LoadReport) -> list[Problem]:
        return [PROBLEM]

    def prepare(self) -> None:
        if self.prepare_error:
            raise ImportError("no such library")

    def score(self, problem: Problem, response: str) -> float:
        verb, _, argument = response.partition(":")
        return float(getattr(self, f"do_{verb}")(argument))

    def feedback(self, problem: Problem, response: str) -> str | None:
        return {"reward:0": "no", "reward:0.50": 5}.get(response)  # type: ignore[return-value]  # misbehaves

    def do_reward(self, value: str) -> float:
        return float(value)

    def do_exit(self, code: str) -> None:
        os._exit(int(code))

    def do_system_exit(self, _: str) -> None:
        sys.exit(3)

    def do_segfault(self, _: str) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def do_raise(self, _: str) -> None:
        raise Unpicklable("one", "two")

    def do_sleep(self, seconds: str) -> float:
        time.sleep(float(seconds))
        return 1.0

    def do_spin(self, seconds: str) -> float:
        end = time.process_time() + float(seconds or "inf")
        while time.process_time() < end:
            pass
        return 1.0

    def do_hang(self, _: str) -> None:
        time.sleep(3600)

    def do_hang_in_c(self, _: str) -> None:
        """Hold the interpreter's lock, so that no Python signal handler and no thread can run."""
        ctypes.PyDLL(None).sleep(3600)

    def do_ignore_term(self, _: str) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3600)

    def do_allocate(self, mib: str) -> float:
        return float(len(bytearray(int(mib) << 20)) > 0)

    def do_fail_once(self, path: str) -> float:
        if Path(path).exists():
            return 1.0
        Path(path).touch()
        os._exit(1)

    def do_has_torch(self, _: str) -> float:
        return float("torch" in sys.modules)

    def do_pid(self, path: str) -> float:
        with Path(path).open("a") as file:
            print(os.getpid(), file=file)
        return 1.0
