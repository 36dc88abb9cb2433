"""Which server a sample goes to, and when."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_hdpo.rollout.engine import EngineLostWeights
from megatron_hdpo.rollout.sglang.dispatcher import Dispatcher, ServersFail
from megatron_hdpo.rollout.sglang.replica import Replica
from megatron_hdpo.types import breaker as breaker_module
from megatron_hdpo.types.breaker import FAILURES


def replicas(count: int) -> list[Replica]:
    made: list[Any] = [SimpleNamespace(url=f"http://{index}") for index in range(count)]
    return [
        Replica(index=i, api=made[i], ask=made[i], info=SimpleNamespace(), state="serving")  # type: ignore[arg-type]
        for i in range(count)
    ]


async def well(replica: Replica) -> bool:
    return True


def dispatcher(
    count: int, limit: int = 4, silence_s: float = 600.0, trial: Callable[[Replica], Awaitable[bool]] = well
) -> Dispatcher:
    return Dispatcher(replicas(count), limit, silence_s, trial)


class Sample:
    """Holds a slot from its start to `end`."""

    def __init__(self, chosen: Dispatcher, affinity: str, n: int = 4, avoid: Collection[int] = ()) -> None:
        self.server: int | None = None
        self._end = asyncio.Event()
        self.task = asyncio.create_task(self._hold(chosen, affinity, n, avoid))

    async def _hold(self, chosen: Dispatcher, affinity: str, n: int, avoid: Collection[int]) -> None:
        async with chosen.slot(affinity, n, avoid) as replica:
            self.server = replica.index
            await self._end.wait()

    async def end(self) -> None:
        self._end.set()
        await self.task


async def settled(samples: list[Sample]) -> list[int | None]:
    for _ in range(10):
        await asyncio.sleep(0)
    return [sample.server for sample in samples]


def break_down(replica: Replica) -> None:
    assert [replica.breaker.fail(str(i), "status 500") for i in range(FAILURES)][-1]


def test_samples_of_a_prompt_share_a_server_and_prompts_are_spread() -> None:
    async def check() -> None:
        chosen = dispatcher(2, limit=8)
        samples = [Sample(chosen, f"prompt {p}") for p in range(4) for _ in range(4)]
        servers = await settled(samples)
        assert [servers[4 * p : 4 * p + 4] for p in range(4)] == [[p % 2] * 4 for p in range(4)]
        for sample in samples:
            await sample.end()
        assert not chosen._prompts and not chosen._waiting
        assert [replica.taken for replica in chosen.replicas] == [0, 0]

    asyncio.run(check())


def test_a_freed_slot_goes_to_a_prompt_in_the_cache_of_its_server() -> None:
    """Two servers have run the first samples of two prompts each, and then one slot after the other is freed."""

    async def check() -> None:
        chosen = dispatcher(2, limit=1)
        running = [Sample(chosen, "earlier 0"), Sample(chosen, "earlier 1")]
        assert await settled(running) == [0, 1]
        waiting = [Sample(chosen, f"prompt {p}") for p in range(4) for _ in range(4)]
        for turn in range(16):
            await running[turn % 2].end()
            await settled(waiting)
            running[turn % 2] = next(s for s in waiting if s.server == turn % 2 and not s.task.done())
        for sample in running:
            await sample.end()
        servers = [sample.server for sample in waiting]
        assert [set(servers[4 * p : 4 * p + 4]) for p in range(4)] == [{0}, {1}, {0}, {1}]

    asyncio.run(check())


def test_no_slot_stays_free_for_the_sake_of_a_cache() -> None:
    async def check() -> None:
        chosen = dispatcher(2, limit=1)
        first, second = Sample(chosen, "prompt"), Sample(chosen, "other")
        waiting = [Sample(chosen, "prompt") for _ in range(2)]
        assert await settled([first, second, *waiting]) == [0, 1, None, None]
        await second.end()
        assert await settled(waiting) == [1, None]
        await waiting[0].end()
        assert await settled(waiting) == [1, 1]
        for sample in (first, waiting[1]):
            await sample.end()

    asyncio.run(check())


def test_samples_do_not_wait_for_the_cache_of_a_server_that_is_lost() -> None:
    async def check() -> None:
        chosen = dispatcher(2, limit=1)
        first, second = Sample(chosen, "prompt"), Sample(chosen, "other")
        waiting = [Sample(chosen, "prompt"), Sample(chosen, "next")]
        assert await settled([first, second, *waiting]) == [0, 1, None, None]
        chosen.replicas[0].state = "down"
        chosen.refresh()
        await second.end()
        assert await settled(waiting) == [None, 1], "it is loose again, behind those that were"
        await waiting[1].end()
        assert await settled(waiting) == [1, 1]
        for sample in (first, waiting[0]):
            await sample.end()
        assert not chosen._prompts

    asyncio.run(check())


def test_a_server_that_comes_back_is_used_from_the_next_look_on() -> None:
    async def check() -> None:
        chosen = dispatcher(2, limit=8)
        chosen.replicas[1].state = "stale"
        samples = [Sample(chosen, f"prompt {i}") for i in range(4)]
        assert await settled(samples) == [0] * 4
        chosen.replicas[1].state = "serving"
        chosen.refresh()
        samples += [Sample(chosen, f"later {i}") for i in range(4)]
        assert await settled(samples) == [0] * 4 + [1] * 4
        for sample in samples:
            await sample.end()

    asyncio.run(check())


class CountedReplica(Replica):
    """Counts how often the state of any server is read."""

    reads = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "state":
            CountedReplica.reads += 1
        return super().__getattribute__(name)


def test_a_sample_costs_the_same_for_any_number_of_servers() -> None:
    async def reads(count: int) -> float:
        made: list[Any] = [
            CountedReplica(
                index=i, api=SimpleNamespace(), ask=SimpleNamespace(), info=SimpleNamespace(), state="serving"
            )  # type: ignore[arg-type]
            for i in range(count)
        ]
        chosen = Dispatcher(made, 4, 600.0, well)
        chosen.refresh()
        before, rounds = CountedReplica.reads, 6
        samples = [Sample(chosen, f"prompt {i // 4}") for i in range(rounds * count)]
        while not all(sample.task.done() for sample in samples):
            for sample, server in zip(samples, await settled(samples), strict=True):
                if server is not None and not sample.task.done():
                    await sample.end()
        return (CountedReplica.reads - before) / len(samples)

    assert asyncio.run(reads(128)) < 1.5 * asyncio.run(reads(8))


def test_one_prompt_with_many_samples_does_not_leave_a_server_idle() -> None:
    async def check() -> None:
        samples = [Sample(chosen := dispatcher(2, limit=64), "prompt", n=1)]
        samples += [Sample(chosen, "prompt", n=1) for _ in range(31)]
        servers = await settled(samples)
        assert min(servers.count(0), servers.count(1)) > 8
        for sample in samples:
            await sample.end()

    asyncio.run(check())


def test_a_sample_is_bound_when_a_slot_frees() -> None:
    """The second server is slow: it takes one sample, and the first one all others."""

    async def check() -> None:
        chosen = dispatcher(2, limit=1)
        samples = [Sample(chosen, f"prompt {i}") for i in range(6)]
        for turn in range(5):
            servers = await settled(samples)
            running = [s for s, at in zip(samples, servers, strict=True) if at == 0 and not s.task.done()]
            assert len(running) == 1, turn
            await running[0].end()
        assert (await settled(samples)).count(1) == 1
        for sample in samples:
            await sample.end()

    asyncio.run(check())


def test_the_oldest_sample_comes_first() -> None:
    async def check() -> None:
        chosen = dispatcher(1, limit=1)
        samples = [Sample(chosen, f"prompt {i}") for i in range(4)]
        for i, sample in enumerate(samples):
            assert (await settled(samples)) == [0] * (i + 1) + [None] * (3 - i)
            await sample.end()

    asyncio.run(check())


def test_a_sample_waits_for_another_server_than_the_one_that_failed_it() -> None:
    async def check() -> None:
        chosen = dispatcher(2, limit=1)
        busy = Sample(chosen, "other", avoid={0})
        retried = Sample(chosen, "prompt", avoid={0})
        assert await settled([busy, retried]) == [1, None]
        following = Sample(chosen, "next")
        assert await settled([busy, retried, following]) == [1, None, 0], "those behind it need not wait"
        await busy.end()
        assert await settled([retried]) == [1]
        for sample in (retried, following):
            await sample.end()

    asyncio.run(check())


def test_a_sample_that_all_failed_goes_to_any() -> None:
    async def check() -> None:
        sample = Sample(dispatcher(2), "prompt", avoid={0, 1})
        assert (await settled([sample]))[0] is not None
        await sample.end()

    asyncio.run(check())


def test_a_server_that_fails_is_tried_again_with_one_sample_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker_module, "FIRST_PAUSE_S", 0.0)
    outcomes = [False, True]

    async def trial(replica: Replica) -> bool:
        return outcomes.pop(0)

    async def check() -> None:
        chosen = dispatcher(2, limit=2, trial=trial)
        break_down(chosen.replicas[0])
        samples = [Sample(chosen, f"prompt {i}") for i in range(6)]
        assert await settled(samples) == [1, 1, None, None, None, None]
        turns = asyncio.create_task(chosen.run())
        while samples[2].server is None:
            await asyncio.sleep(0.01)
        assert not outcomes and await settled(samples) == [1, 1, 0, None, None, None], "one after the second trial"
        chosen.replicas[0].breaker.succeed()
        await samples[2].end()
        assert await settled(samples[3:]) == [0, 0, None], "as many as fit"
        turns.cancel()
        for sample in samples:
            await sample.end()

    asyncio.run(check())


def test_without_a_serving_server_nobody_waits() -> None:
    async def check() -> None:
        chosen = dispatcher(2, limit=1)
        samples = [Sample(chosen, f"prompt {i}") for i in range(3)]
        await settled(samples)
        for replica in chosen.replicas:
            replica.state = "down"
        turns = asyncio.create_task(chosen.run())
        with pytest.raises(EngineLostWeights):
            await asyncio.wait_for(samples[2].task, 60)
        turns.cancel()
        with pytest.raises(EngineLostWeights):
            await Sample(chosen, "late").task
        for sample in samples[:2]:
            await sample.end()
        assert not chosen._waiting and [replica.taken for replica in chosen.replicas] == [0, 0]

    asyncio.run(check())


def test_when_every_server_fails_samples_wait_and_not_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    async def never(replica: Replica) -> bool:
        return False

    async def check() -> None:
        chosen = dispatcher(2, silence_s=0.3, trial=never)
        for replica in chosen.replicas:
            break_down(replica)
        samples = [Sample(chosen, f"prompt {i}") for i in range(3)]
        assert await settled(samples) == [None] * 3
        turns = asyncio.create_task(chosen.run())
        for sample in samples:
            with pytest.raises(ServersFail, match=r"rollout\.sglang: every server has failed.* 0\.3 s.*status 500"):
                await asyncio.wait_for(sample.task, 60)
        turns.cancel()

    with caplog.at_level(logging.WARNING):
        asyncio.run(check())
    assert sum("every SGLang server fails" in line for line in caplog.messages) == 1


def test_a_sample_that_is_cancelled_gives_its_slot_back() -> None:
    async def check() -> None:
        chosen = dispatcher(1, limit=1)
        first, second, third = (Sample(chosen, f"prompt {i}") for i in range(3))
        await settled([first])
        second.task.cancel()
        await first.end()
        assert await settled([third]) == [0]
        third.task.cancel()
        await asyncio.gather(third.task, second.task, return_exceptions=True)
        assert chosen.replicas[0].taken == 0 and not chosen._waiting

    asyncio.run(check())
