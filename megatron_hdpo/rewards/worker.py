"""The code inside a reward worker: a process without torch that may hang, crash or run out of memory without harm.

The tasks live in a module variable: they belong to the process, and calls carry only a problem and a response.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

from megatron_hdpo.rewards.functions import WorkerFunction
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.shipped import loads
from megatron_hdpo.types.task import Task

LOGGER = logging.getLogger(__name__)
MIB = 1 << 20
_PR_SET_PDEATHSIG = 1
_LONGEST_ERROR = 2000


class Outcome(NamedTuple):
    """The result of a call: a value, or the error that prevented it."""

    value: Any
    error: str | None


@dataclass
class _Worker:
    tasks: dict[str, Task] = field(default_factory=dict)
    functions: dict[str, WorkerFunction] = field(default_factory=dict)
    error: str | None = None


_worker = _Worker()


def start(pickled: bytes, memory_limit_mib: int | None) -> None:
    """Prepare the process. What cannot be prepared is reported by every check; the worker does not die of it.

    pickled: the tasks, and the reward functions that run in workers, by `dumps`.
    """
    end_with_parent()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    try:
        tasks, functions = loads(pickled)
        for task in tasks:
            task.prepare()
            _worker.tasks[task.task_name] = task
        for function in functions:
            function.prepare()
            _worker.functions[function.function_name] = function
    except Exception as error:
        _worker.error = f"the reward worker cannot prepare its tasks: {type(error).__name__}: {error}"
    if memory_limit_mib is not None:
        _limit_memory(memory_limit_mib)


def judge(problem: Problem, response: str, limit_s: float) -> Outcome:
    """Return an Outcome with (reward, seconds, feedback) of a response, or with the error that its task raised.

    The system kills this process when it takes more than `limit_s` seconds of processor time.
    """
    with _processor_time(limit_s):
        return guarded(lambda: _judge(problem, response))


def evaluate(function: str, problem: Problem, response: str, limit_s: float) -> Outcome:
    """Return an Outcome as `judge` does, of the reward function with this name; it has no feedback."""
    with _processor_time(limit_s):
        return guarded(lambda: _evaluate(function, problem, response))


def check_gold(answer: str, limit_s: float) -> Outcome:
    """Return an Outcome with the reason why a gold answer cannot be parsed, None when it can. limit_s: see `judge`."""
    with _processor_time(limit_s):
        return guarded(lambda: _check_gold(answer))


def ready() -> Outcome:
    """Return an Outcome with the names of the tasks that this worker scores, or with the error of their preparation."""
    return guarded(_task_names)


def guarded(function: Callable[[], Any]) -> Outcome:
    """Return the Outcome of a call, exceptions as text: some of them cannot be pickled, which would break the pool."""
    try:
        return Outcome(function(), None)
    except BaseException as error:  # SystemExit and math-verify's TimeoutException are no Exceptions
        return Outcome(None, f"{type(error).__name__}: {error}"[:_LONGEST_ERROR])


@contextmanager
def _processor_time(limit_s: float) -> Iterator[None]:
    """Let the kernel kill this process after `limit_s` seconds of processor time, inside of C code too."""
    signal.setitimer(signal.ITIMER_PROF, limit_s)  # nobody handles its signal
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _judge(problem: Problem, response: str) -> tuple[float, float, str | None]:
    _task_names()
    begin = time.perf_counter()
    task = _task(problem)
    reward = float(task.score(problem, response))
    if not 0.0 <= reward <= 1.0:
        raise ValueError(f"task {problem.task!r} scored {reward}: rewards lie between 0 and 1")
    feedback = task.feedback(problem, response)
    if not (feedback is None or isinstance(feedback, str)):
        raise TypeError(f"task {problem.task!r} gave {type(feedback).__name__} as feedback: it must be text or None")
    return reward, time.perf_counter() - begin, feedback


def _evaluate(name: str, problem: Problem, response: str) -> tuple[float, float, None]:
    _task_names()
    begin = time.perf_counter()
    value = _worker.functions[name].score(problem, response)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"its value is {type(value).__name__}, not a number")
    return float(value), time.perf_counter() - begin, None


def _check_gold(answer: str) -> str | None:
    from megatron_hdpo.rewards.math import GoldError, parse_gold

    try:
        parse_gold(answer)
    except GoldError as error:
        return str(error)
    return None


def _task_names() -> list[str]:
    if _worker.error:
        raise RuntimeError(_worker.error)
    return sorted(_worker.tasks)


def _task(problem: Problem) -> Task:
    try:
        return _worker.tasks[problem.task]
    except KeyError:
        names = ", ".join(sorted(_worker.tasks))
        raise LookupError(f"problem {problem.id} names the task {problem.task!r}; the pool has: {names}") from None


def end_with_parent() -> None:
    """End on SIGTERM, also inside a long C call that never returns to Python's handlers, and when the parent ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _let_the_fork_server_end()


def _let_the_fork_server_end() -> None:
    """Close our copy of the pipe by which the fork server, our parent, sees that the main process lives.

    multiprocessing gives it to every child, for grandchildren that we do not have, and has no public way to refuse it.
    While a hanging worker holds it, the fork server outlives a killed main process, and the worker the fork server.
    """
    server: Any = forkserver._forkserver
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None


def _limit_memory(limit_mib: int) -> None:
    """Allow the address space that is mapped now, libraries and their thread stacks, and `limit_mib` more.

    A hard limit of the system (`ulimit -v`) stays: a process may not raise it, and less than it is what it allows.
    """
    if sys.platform != "linux":
        return
    import resource

    try:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError as error:
        LOGGER.warning("a reward worker has no memory limit: it cannot tell what it uses (%s)", error)
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = mapped + limit_mib * MIB
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
