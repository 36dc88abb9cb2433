"""Calls in worker processes that are killed when they run too long, on top of Pebble's process pool.

The time limit of a call starts when a worker takes it, not while it waits. Workers start from a fork server, because
the parent holds torch and its threads. The kernel kills the workers when the fork server ends, and the fork server ends
with the parent. Workers import torch only if the parent's main script does so at its top: multiprocessing imports that
script in each worker (but not the `__main__` of a package started by `python -m`).
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pebble import ProcessExpired, ProcessPool

from megatron_hdpo.rewards.worker import Outcome

PRELOADED = ["megatron_hdpo.rewards.math", "megatron_hdpo.rewards.worker"]
"""Imported once by the fork server, so that a killed worker's successor is there in milliseconds."""


@dataclass(eq=False)
class _Call:
    function: Callable[..., Outcome]
    args: tuple[object, ...]
    time_limit_s: float
    retries: int
    outcome: Future[Outcome]


class KillableWorkers:
    """A pool whose calls always end: with the function's Outcome, or with one that says how the call failed."""

    def __init__(self, count: int, initializer: Callable[..., None], initargs: tuple[object, ...]) -> None:
        self._count, self._initializer, self._initargs = count, initializer, initargs
        self._lock = threading.RLock()
        self._pool: ProcessPool | None = None
        self._running: dict[Future[Outcome], ProcessPool] = {}
        self._waiting: set[_Call] = set()
        self._closed = False

    def call(
        self, function: Callable[..., Outcome], args: tuple[object, ...], time_limit_s: float, retries: int = 0
    ) -> Future[Outcome]:
        """Run `function` in a worker; a call that fails, hangs or kills its worker is tried `retries` more times."""
        call = _Call(function, args, time_limit_s, retries, Future())
        with self._lock:
            self._waiting.add(call)
        self._attempt(call)
        return call.outcome

    def close(self) -> None:
        """Kill the workers and end all calls. Idempotent."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
            waiting, self._waiting = self._waiting, set()
        for call in waiting:
            _finish(call, Outcome(None, "the workers were closed before this call was done"))
        if pool is not None:
            _dispose(pool)

    def _attempt(self, call: _Call) -> None:
        with self._lock:
            if self._closed:
                self._waiting.discard(call)
                _finish(call, Outcome(None, "the workers are closed"))
                return
            pool = self._active_pool()
            future: Future[Outcome] = pool.schedule(call.function, call.args, timeout=call.time_limit_s)
            self._running[future] = pool
        future.add_done_callback(lambda done: self._attempted(call, done))

    def _attempted(self, call: _Call, future: Future[Outcome]) -> None:
        with self._lock:
            pool = self._running.pop(future)
        outcome = _outcome(future, call.time_limit_s)
        if isinstance(future.exception(), BrokenProcessPool):
            self._abandon(pool)
        if outcome.error is not None and call.retries > 0 and not self._closed:
            call.retries -= 1
            self._attempt(call)
            return
        with self._lock:
            self._waiting.discard(call)
        _finish(call, outcome)

    def _active_pool(self) -> ProcessPool:
        if self._pool is not None and not self._pool.active:
            self._abandon(self._pool)
        if self._pool is None:
            self._pool = ProcessPool(
                self._count, initializer=self._initializer, initargs=self._initargs, context=_context()
            )
        return self._pool

    def _abandon(self, pool: ProcessPool) -> None:
        """Replace a broken pool; calls in its queue would be lost, so they fail here and are tried again."""
        with self._lock:
            if self._pool is not pool:
                return
            self._pool = None
            lost = [future for future, its_pool in self._running.items() if its_pool is pool and not future.done()]
        threading.Thread(target=_dispose, args=(pool,), daemon=True).start()
        for future in lost:
            with suppress(InvalidStateError):
                future.set_exception(BrokenProcessPool("the pool broke while this call was waiting"))


def _outcome(future: Future[Outcome], time_limit_s: float) -> Outcome:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, TimeoutError):
        return Outcome(None, f"no result within the time limit of {time_limit_s:g} s; the worker was killed")
    if isinstance(error, ProcessExpired) and error.exitcode == -signal.SIGPROF:
        return Outcome(None, "no result within the limit of processor time; the worker was killed")
    if isinstance(error, ProcessExpired):
        return Outcome(None, f"the worker process died with exit code {error.exitcode}")
    return Outcome(None, f"{type(error).__name__}: {error}")


def _finish(call: _Call, outcome: Outcome) -> None:
    with suppress(InvalidStateError):  # the call was ended by close() meanwhile
        call.outcome.set_result(outcome)


def _dispose(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _context() -> Any:
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
