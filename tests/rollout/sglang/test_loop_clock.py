"""What a server is not blamed for: time in which the trainer's process stood still, and time before its return."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_hdpo.rollout.sglang.loop_clock import TICK_S, LoopClock
from megatron_hdpo.rollout.sglang.watch import Watch


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def live(clock: LoopClock, fake: Clock, seconds: float) -> None:
    for _ in range(round(seconds / TICK_S)):
        fake.now += TICK_S
        clock.tick()


def test_seconds_without_ticks_do_not_count() -> None:
    fake = Clock()
    clock = LoopClock(fake)
    begin = clock.now()
    live(clock, fake, 30)
    assert clock.now() - begin == 30
    fake.now += 600
    assert 30 <= clock.now() - begin <= 30 + 2 * TICK_S, "whether or not it has ticked since"
    clock.tick()
    assert 30 <= clock.now() - begin <= 30 + 2 * TICK_S
    live(clock, fake, 5)
    assert 35 <= clock.now() - begin <= 35 + 2 * TICK_S


def test_it_ticks_in_its_loop() -> None:
    async def lived() -> tuple[float, float]:
        clock = LoopClock()
        ticking = asyncio.create_task(clock.run())
        begin, loop = clock.now(), asyncio.get_running_loop()
        start = loop.time()
        while loop.time() < start + 4 * TICK_S:
            await asyncio.sleep(0.01)
        ticking.cancel()
        return clock.now() - begin, 4 * TICK_S

    found, least = asyncio.run(lived())
    assert found > 0.5 * least


class Watched:
    """A watch of one server that answers no health check, and what was done to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
        self.taken_out: list[str] = []
        self.fake = Clock()
        config = SimpleNamespace(health_interval_s=1.0, health_timeout_s=60.0)
        self.watch = Watch(SimpleNamespace(config=config, servers=None))  # type: ignore[arg-type]
        self.watch.clock = LoopClock(self.fake)
        self.replica: Any = SimpleNamespace(index=0, own=None, state=state)

        async def healthy(replica: Any) -> bool:
            return False

        async def mark_down(replica: Any, reason: str) -> None:
            self.taken_out.append(reason)

        async def readmit(replica: Any) -> None:
            replica.state = "serving"

        for name, fake in {"_healthy": healthy, "mark_down": mark_down, "_readmit": readmit}.items():
            monkeypatch.setattr(self.watch, name, fake)

    def check(self, healthy_at: float) -> float:
        return asyncio.run(self.watch._check_once(self.replica, healthy_at))


@pytest.mark.fault(
    "the trainer's process stands still for an hour",
    phase="sampling",
    seen="nothing: no server is taken for hung",
    lost="nothing",
)
def test_a_process_that_stood_still_blames_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, "serving")
    healthy_at = watched.watch.clock.now()
    watched.fake.now += 3600
    assert watched.check(healthy_at) == healthy_at and not watched.taken_out
    live(watched.watch.clock, watched.fake, 61)
    watched.check(healthy_at)
    assert [reason.split(" for ")[0] for reason in watched.taken_out] == ["no sign of health"]


def test_a_server_that_is_back_has_its_whole_time_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, "down")
    healthy_at = watched.watch.clock.now()
    live(watched.watch.clock, watched.fake, 300)
    healthy_at = watched.check(healthy_at)
    assert watched.replica.state == "serving"
    live(watched.watch.clock, watched.fake, 30)
    watched.check(healthy_at)
    assert not watched.taken_out
