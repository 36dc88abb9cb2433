"""Rollouts sampled ahead: one step after the other, by one thread at a time, whatever becomes of the engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from fake_engine import FakeEngine
from server_tools import wait_until
from thread_ranks import PROBLEMS, Context, World, coordinator

from megatron_hdpo.objectives.base import BaseObjective, ObjectiveDeps
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.rollout.engine import EngineLostWeights
from megatron_hdpo.sampling.prefetch import PrefetchedRollouts
from megatron_hdpo.sampling.step_rollouts import StepRollouts
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import GenerationRequest, GenerationResult, Group

OBJECTIVE = BaseObjective(ObjectiveSettings(), ObjectiveDeps())
ALONE: Any = Context(World(1), 0)


class FirstCliffs(BaseObjective):
    """One privileged rollout for the first group, known when all groups are."""

    max_privileged_prompts = 1

    def privileged_rollouts_for(self, group: Group, step: int) -> int:
        return 1


class OneReader(FakeEngine):
    """Each time that its results are read takes a turn, for which it waits; only one thread may read at a time.

    happens: called when a reader has got its turn, with the number of turns before. breaks: called after the first
    result of all. waited: requests that were waiting when others were submitted.
    """

    deterministic = False

    def __init__(
        self,
        turns: int = 0,
        happens: Callable[[int], None] = lambda turn: None,
        breaks: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__()
        self.turns, self.happens, self.breaks = threading.Semaphore(turns), happens, breaks
        self.taken = 0
        self.waited: list[int] = []
        self._reading = threading.Lock()

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        self.waited.append(len(self._waiting))
        super().submit(requests)

    @property
    def is_read(self) -> bool:
        return self._reading.locked()

    def results(self) -> Iterator[GenerationResult]:
        assert self._reading.acquire(blocking=False), "two threads read the results of one engine"
        try:
            assert self.turns.acquire(timeout=60)
            self.taken += 1
            self.happens(self.taken - 1)
            for number, result in enumerate(super().results()):
                yield result
                if self.taken == 1 and number == 0:
                    self.breaks()
        finally:
            self._reading.release()


@contextmanager
def ahead_on(
    engine: OneReader, context: Any = ALONE, restore: Callable[[], None] | None = None, joins: bool = False
) -> Iterator[Any]:
    rollouts = coordinator(context)
    rollouts.sampler.engine, rollouts.restore_weights = engine, restore
    order = Order()
    prefetched = PrefetchedRollouts(rollouts, order.batch, joins)
    try:
        yield prefetched
    finally:
        prefetched.close()
        engine.turns.release(99)
    assert order.asked == sorted(set(order.asked)), "each step once, and none after a later one"


class Order:
    def __init__(self) -> None:
        self.asked: list[int] = []

    def batch(self, step: int) -> Sequence[Problem]:
        self.asked.append(step)
        return PROBLEMS[step % 3 : step % 3 + 2]


def problems_of(rollouts: StepRollouts) -> list[Problem]:
    return [outline.problem for outline in rollouts.outlines]


def versions_of(rollouts: StepRollouts) -> set[int]:
    return {version for outline in rollouts.outlines for sample in outline.samples for version in sample.versions}


def in_a_thread(work: Callable[[], None]) -> threading.Event:
    """An event that is set when the work is done."""
    done = threading.Event()

    def run() -> None:
        work()
        done.set()

    threading.Thread(target=run, daemon=True).start()
    return done


def test_steps_are_sampled_in_order_each_with_the_weights_of_its_time() -> None:
    engine = OneReader()
    with ahead_on(engine) as prefetched:
        for step in (1, 2, 3, 2):
            prefetched.begin(step, OBJECTIVE)
        assert (prefetched.begun, prefetched.ready) == (3, 0)
        for step in (1, 2, 3):
            engine.weight_version = 10 * step
            engine.turns.release()
            rollouts = prefetched.take(step, OBJECTIVE)
            assert problems_of(rollouts) == PROBLEMS[step % 3 : step % 3 + 2] and versions_of(rollouts) == {10 * step}
        engine.turns.release()
        assert problems_of(prefetched.take(4, OBJECTIVE)) == PROBLEMS[1:3], "which was not begun"


def test_steps_wait_complete_until_they_are_taken() -> None:
    with ahead_on(OneReader(turns=2)) as prefetched:
        for step in (1, 2, 3):
            prefetched.begin(step, OBJECTIVE)
        assert wait_until(lambda: prefetched.ready == 2)
        prefetched.take(1, OBJECTIVE)
        assert (prefetched.begun, prefetched.ready) == (2, 1)
        with pytest.raises(AssertionError, match="step 2 was begun, step 3 is wanted"):
            prefetched.take(3, OBJECTIVE)


def test_a_pause_completes_the_step_that_is_next_and_begins_no_other() -> None:
    engine, leave = OneReader(), threading.Event()
    paused = threading.Event()
    with ahead_on(engine) as prefetched:
        for step in (1, 2):
            prefetched.begin(step, OBJECTIVE)

        def pause() -> None:
            with prefetched.paused(), prefetched.paused():  # the second has nothing to wait for
                paused.set()
                assert leave.wait(60)

        done = in_a_thread(pause)
        assert wait_until(lambda: prefetched._last_allowed == 1) and not paused.is_set()
        engine.turns.release(2)
        assert paused.wait(60) and prefetched.ready == 1
        assert not wait_until(lambda: engine.is_read, 0.2), "the second step waits for the end of the pause"
        leave.set()
        assert done.wait(60) and len(prefetched.take(1, OBJECTIVE)) == len(prefetched.take(2, OBJECTIVE)) == 2


def test_privileged_rollouts_that_wait_for_the_whole_step_do_not_meet_the_next_step() -> None:
    objective = FirstCliffs(ObjectiveSettings(), ObjectiveDeps())
    engine = OneReader(turns=1)
    with ahead_on(engine) as prefetched:
        for step in (1, 2):
            prefetched.begin(step, objective)
        assert wait_until(lambda: prefetched.ready == 1 and engine.is_read), "the second step is being sampled"
        taken: list[StepRollouts] = []
        done = in_a_thread(lambda: taken.append(prefetched.take(1, objective)))
        assert not done.wait(0.2)
        engine.turns.release(2)
        assert done.wait(60)
        assert [outline.privileged_prompt_length for outline in taken[0].outlines] == [3, 0]


def test_an_error_of_the_thread_is_raised_when_its_step_is_wanted(caplog: pytest.LogCaptureFixture) -> None:
    def breaks(turn: int) -> None:
        if turn == 1:
            raise RuntimeError("the engine broke")

    engine = OneReader(turns=9, happens=breaks)
    with ahead_on(engine) as prefetched:
        for step in (1, 2, 3):
            prefetched.begin(step, OBJECTIVE)
        assert wait_until(lambda: prefetched.ready == 3)
        assert "the run will end at step 3, whose rollouts failed: the engine broke" in caplog.text
        assert len(prefetched.take(1, OBJECTIVE)) == 2
        prefetched.begin(4, OBJECTIVE)
        with prefetched.paused():
            assert engine.taken == 2, "no step is sampled on an engine that holds requests of another one"
        with pytest.raises(RuntimeError, match="the engine broke"):
            prefetched.take(2, OBJECTIVE)


def test_no_step_begins_on_an_engine_without_weights() -> None:
    """The second rank's engine loses them in step 1; all ranks restore them when that step is wanted."""

    def work(context: Any) -> tuple[list[list[Problem]], list[str]]:
        happened: list[str] = []

        def happens(turn: int) -> None:
            happened.append("read")
            if context.rank == 1 and turn == 0:
                engine.close()
                raise EngineLostWeights("its server died")

        engine = OneReader(turns=9, happens=happens)
        with ahead_on(engine, context, lambda: happened.append("restored")) as prefetched:
            for step in (1, 2):
                prefetched.begin(step, OBJECTIVE)
            assert wait_until(lambda: prefetched.ready == (2 if context.rank == 0 else 1))
            with prefetched.paused():  # there is nothing to wait for
                assert len(happened) == (2 if context.rank == 0 else 1)
            context.barrier("paused")
            return [problems_of(prefetched.take(step, OBJECTIVE)) for step in (1, 2)], happened

    (first, _), (second, happened) = World(2).run(work)
    assert first == second == [PROBLEMS[1:3], PROBLEMS[2:4]]
    assert happened == ["read", "restored", "read", "read"]


def test_closing_ends_the_steps_that_have_not_begun() -> None:
    engine = OneReader()
    with ahead_on(engine) as prefetched:
        for step in (1, 2, 3):
            prefetched.begin(step, OBJECTIVE)
        assert wait_until(lambda: engine.is_read)
        prefetched.close()
        engine.turns.release(9)
        assert wait_until(lambda: prefetched.ready == 3) and engine.taken == 1


def test_a_step_joins_the_one_before_it_when_the_engine_has_free_slots() -> None:
    """Of the six samples of a step three come at a time, so that with four slots one is free then."""

    def sampled(joins: bool, slots: int, turns: int) -> tuple[list[Any], list[str], list[int], int]:
        engine = OneReader()
        engine.slots = slots
        with ahead_on(engine, joins=joins) as prefetched:
            for step in (1, 2, 3):
                prefetched.begin(step, OBJECTIVE)
            engine.turns.release(turns)
            taken = [prefetched.take(step, OBJECTIVE) for step in (1, 2, 3)]
        samples = [[[s.text for s in g.samples] for g in rollouts.held.values()] for rollouts in taken]
        return samples, [request.request_id for request in engine.seen], engine.waited, engine.taken

    alone = sampled(joins=False, slots=99, turns=3)
    samples = alone[0]
    assert alone == (samples, ["0#0", "1#0"] * 3, [0, 0, 0], 3) == sampled(joins=True, slots=0, turns=3)
    joined = ["0#0", "1#0", "1:0#0", "1:1#0", "2:0#0", "2:1#0"]
    assert sampled(joins=True, slots=3, turns=1) == (samples, joined, [0, 0, 0], 1)
    assert sampled(joins=True, slots=4, turns=1) == (samples, joined, [0, 1, 1], 1), "while one request waits"


def test_a_pause_completes_all_steps_that_are_being_sampled() -> None:
    go_on = threading.Event()
    engine = OneReader(breaks=lambda: go_on.wait(60))
    engine.slots = 9
    with ahead_on(engine, joins=True) as prefetched:
        for step in (1, 2):
            prefetched.begin(step, OBJECTIVE)
        engine.turns.release()
        assert wait_until(lambda: len(engine.seen) == 4), "the second has joined the first"
        prefetched.begin(3, OBJECTIVE)
        in_pause: list[tuple[int, int]] = []

        def pause() -> None:
            with prefetched.paused():
                in_pause.append((prefetched.ready, len(engine.seen)))  # step 3 may begin when it ends
                assert not engine.is_read

        done = in_a_thread(pause)
        assert wait_until(lambda: prefetched._last_allowed == 2) and not done.is_set()
        go_on.set()
        assert done.wait(60) and in_pause == [(2, 4)]
        engine.turns.release()
        assert [len(prefetched.take(step, OBJECTIVE)) for step in (1, 2, 3)] == [2, 2, 2]


@pytest.mark.fault(
    "the servers are lost while several steps are sampled ahead",
    phase="sampling",
    seen="a warning; all of them go on after the next weight update",
    lost="nothing",
)
def test_steps_that_lost_their_engine_together_go_on_together() -> None:
    happened: list[str] = []

    def lose() -> None:
        engine.close()
        raise EngineLostWeights("its server died")

    engine = OneReader(happens=lambda turn: happened.append("read"), breaks=lose)
    engine.slots = 9
    with ahead_on(engine, restore=lambda: happened.append("restored"), joins=True) as prefetched:
        for step in (1, 2):
            prefetched.begin(step, OBJECTIVE)
        engine.turns.release(9)
        assert wait_until(lambda: prefetched.ready == 2)
        prefetched.begin(3, OBJECTIVE)
        with prefetched.paused():
            assert happened == ["read"]
        for step in (1, 2, 3):
            rollouts = prefetched.take(step, OBJECTIVE)
            assert problems_of(rollouts) == PROBLEMS[step % 3 : step % 3 + 2]
            assert [len(outline.samples) + sum(outline.dropped.values()) for outline in rollouts.outlines] == [3, 3]
    assert happened == ["read", "restored", "read", "read"], "restored once, for both"


def test_an_error_ends_all_steps_that_are_being_sampled() -> None:
    def fail() -> None:
        raise RuntimeError("the engine broke")

    engine = OneReader(breaks=fail)
    engine.slots = 9
    with ahead_on(engine, joins=True) as prefetched:
        for step in (1, 2):
            prefetched.begin(step, OBJECTIVE)
        engine.turns.release(9)
        assert wait_until(lambda: prefetched.ready == 2)
        with prefetched.paused():
            assert not engine.is_read
        with pytest.raises(RuntimeError, match="the engine broke"):
            prefetched.take(1, OBJECTIVE)
