"""Rollouts of each step, sampled on request or while earlier steps are trained on."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from megatron_hdpo.sampling.coordinator import RolloutCoordinator, SampledShare, completed
from megatron_hdpo.sampling.sampler import Progress, SamplingJob
from megatron_hdpo.sampling.step_rollouts import StepRollouts
from megatron_hdpo.types.learning import Objective
from megatron_hdpo.types.problem import Problem

LOGGER = logging.getLogger(__name__)


@dataclass(eq=False)
class _Begun:
    """A step that was begun. sampled: whether its first requests have been made."""

    step: int
    problems: Sequence[Problem]
    objective: Objective
    sampled: bool = False
    share: Future[SampledShare] = field(default_factory=Future)


class PrefetchedRollouts:
    """Samples the rollouts of the next steps in a thread.

    Each rank samples its share of the steps that it was told to `begin`, in their order, as fast as it can; `take` is
    collective and returns the groups of a step. An engine serves one thread at a time: the caller's thread uses it only
    while the other one is `paused`, or has nothing to do.

    batch: problems of a step (counted from 0); it is called once per step, in their order. joins: whether a step begins
    as soon as the engine has free slots, or when the one before it is complete.
    """

    def __init__(
        self, coordinator: RolloutCoordinator, batch: Callable[[int], Sequence[Problem]], joins: bool = False
    ) -> None:
        self.coordinator, self.batch, self.joins = coordinator, batch, joins
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts-ahead")
        self._begun: dict[int, _Begun] = {}
        self._pauses = 0
        # What follows is shared with the thread.
        self._changed = threading.Condition()
        self._queue: deque[_Begun] = deque()
        self._last_allowed = math.inf
        self._uses_engine = False
        self._lost: int | None = None
        self._ended: BaseException | None = None

    @property
    def begun(self) -> int:
        """Return the number of steps that were begun and not taken yet."""
        return len(self._begun)

    @property
    def ready(self) -> int:
        """Return the number of these steps whose share of this rank is complete."""
        return sum(begun.share.done() for begun in self._begun.values())

    def begin(self, step: int, objective: Objective) -> None:
        """Queue this rank's share of a step, unless it was begun; its samples are of the newest weights."""
        if step in self._begun:
            return
        begun = self._begun[step] = _Begun(step, self.batch(step), objective)
        with self._changed:
            if self._ended is not None:
                begun.share.set_exception(self._ended)
                return
            self._queue.append(begun)
        self._thread.submit(self._sample)

    def take(self, step: int, objective: Objective, progress: Progress | None = None) -> StepRollouts:
        """Return the groups of a step: those begun before, or sampled now. Collective.

        Raises the error that ended the thread when it was sampling this step.
        """
        if not self._begun:
            with self.paused():
                return self.coordinator.step(self.batch(step), step, objective, progress)
        first = next(iter(self._begun))
        assert first == step, f"step {first} was begun, step {step} is wanted"
        share = self._begun.pop(step).share.result()
        with nullcontext() if share.complete else self.paused():
            rollouts = self.coordinator.finish_step(share, objective, progress)
        with self._changed:
            if self._lost == step:
                self._lost = None
                self._changed.notify_all()
        return rollouts

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wait until the steps that are being sampled are complete, and begin no other one before the block ends.

        Blocks may be nested. An error of the thread is raised by `take`.
        """
        if not self._pauses:
            self._complete()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                with self._changed:
                    self._last_allowed = math.inf
                    self._changed.notify_all()

    def close(self) -> None:
        """Shut down without waiting for what is being sampled."""
        self._end(CancelledError())
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _complete(self) -> None:
        """Complete the steps that are being sampled, or the one that is next, and allow no other."""
        with self._changed:
            open_steps = [begun for begun in self._begun.values() if not begun.share.done()]
            if self._lost is not None:
                open_steps = []  # they go on when `take` has restored the weights
            begin = [begun for begun in open_steps if begun.sampled] or open_steps[:1]
            self._last_allowed = begin[-1].step if begin else -1
        wait([begun.share for begun in begin])
        with self._changed:
            self._changed.wait_for(lambda: not self._uses_engine)

    # The methods below run in the thread; `_end` in both.

    def _sample(self) -> None:
        """Sample this rank's share of the next step when it may begin, unless it has joined another one."""
        first = self._next(waits=True)
        if first is None:
            return
        running = [first]
        shares: dict[_Begun, SampledShare] = {}

        def join(job: SamplingJob) -> bool:
            following = self._next(waits=False)
            if following is None:
                return False
            running.append(following)
            shares[following] = self._add(job, following)
            return True

        try:
            job = self.coordinator.sampler.begin([], idle=join if self.joins else None)
            shares[first] = self._add(job, first)
            if not completed(job):
                self._lose({begun: share for begun, share in shares.items() if not begun.share.done()}, job)
        except BaseException as error:
            self._fail([begun for begun in running if not begun.share.done()], error)
        finally:
            with self._changed:
                self._uses_engine = False
                self._changed.notify_all()

    def _next(self, waits: bool) -> _Begun | None:
        """Return the next step if it may begin now, else None. waits: for that."""
        with self._changed:
            if waits:
                self._changed.wait_for(lambda: self._ended is not None or not self._queue or self._allows_next())
            if self._ended is not None or not self._queue or not self._allows_next():
                return None
            begun = self._queue.popleft()
            begun.sampled = self._uses_engine = True
            return begun

    def _allows_next(self) -> bool:
        return self._lost is None and self._queue[0].step <= self._last_allowed

    def _add(self, job: SamplingJob, begun: _Begun) -> SampledShare:
        def done(share: SampledShare) -> None:
            if not begun.share.done():  # it may have been handed over unfinished
                begun.share.set_result(share)

        return self.coordinator.add_share(job, begun.problems, begun.step, begun.objective, done)

    def _lose(self, unfinished: Mapping[_Begun, SampledShare], job: SamplingJob) -> None:
        """Hand over what an engine without weights has left to do: `take` of the first of these steps does it all."""
        with self._changed:
            self._lost = min(begun.step for begun in unfinished)
            for begun, share in unfinished.items():
                share.unfinished = job
                begun.share.set_result(share)

    def _fail(self, failed: Sequence[_Begun], error: BaseException) -> None:
        if self._ended is None and failed:
            LOGGER.warning("the run will end at step %d, whose rollouts failed: %s", failed[0].step + 1, error)
        self._end(error)  # the engine may still hold requests of these steps
        for begun in failed:
            begun.share.set_exception(error)

    def _end(self, error: BaseException) -> None:
        """Begin no step any more; each that has not begun ends with the error."""
        with self._changed:
            self._ended = error
            for begun in self._queue:
                begun.share.set_exception(error)
            self._queue.clear()
            self._changed.notify_all()
