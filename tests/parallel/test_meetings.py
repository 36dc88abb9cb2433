"""Meetings of ranks: work may outlast a collective's deadline; a rank that hangs or ends is named, on every rank."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from distributed_helper import environment_of, forkserver, leave_layout, run_ranks

from megatron_hdpo.parallel.context import ParallelContext, start
from megatron_hdpo.parallel.late import Patience
from megatron_hdpo.parallel.layout import ParallelConfig
from megatron_hdpo.parallel.meetings import Meetings, RankError

COLLECTIVE_S, SILENCE_S, WORK_S = 2.0, 3.0, 5.0
LATE = 1
REPORT = r"waiting for 'rollouts of all ranks': rank 1 on \S+: rollout \d+/100 samples"


def context_of(silence_s: float = SILENCE_S, collective_s: float = COLLECTIVE_S) -> ParallelContext:
    return start(ParallelConfig(timeout_minutes=collective_s / 60, silence_minutes=silence_s / 60), "cpu")


def number_of_keys() -> int:
    return dist.distributed_c10d._get_default_store().num_keys()


def long_work_then_silence(folder: Path) -> dict[str, Any]:
    """What a rank saw of a meeting after work with progress, and of one for which a rank never comes."""
    context, done = context_of(), 0
    context.barrier("the start")
    context.heartbeat.progress = lambda: f"rollout {done}/100 samples"
    reports: list[str] = []
    context.heartbeat.report = reports.append
    context.heartbeat.patience = replace(context.heartbeat.patience, say_s=1.0)
    begun = time.monotonic()
    while context.rank == LATE and time.monotonic() - begun < WORK_S:
        done += 1
        time.sleep(0.1)
    context.barrier("rollouts of all ranks")
    seen: dict[str, Any] = {"seconds": time.monotonic() - begun, "gathered": context.gather_objects(context.rank)}
    seen["reports"] = list(reports)
    done = 42
    seen["error"] = error_of(lambda: context.barrier("the evaluation")) if context.rank != LATE else ""
    (folder / str(context.rank)).touch()
    wait_for(lambda: len(list(folder.iterdir())) == context.world_size)
    if context.rank == LATE:  # too late
        seen["error"] = error_of(lambda: context.barrier("the evaluation"))
    return seen


def error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except RankError as error:
        return str(error)
    return ""


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.fault(
    "a rank makes no progress",
    phase="sampling, evaluation",
    seen="after `parallel.silence_minutes` one line with the rank, its host and what it did last",
    lost="the steps since the last checkpoint",
)
def test_work_that_progresses_may_take_any_time_and_silence_has_a_deadline(ranks: int, tmp_path: Path) -> None:
    seen = run_ranks(ranks, long_work_then_silence, tmp_path)
    for one in seen:
        assert one["seconds"] >= WORK_S > max(COLLECTIVE_S, SILENCE_S)
        assert one["gathered"] == list(range(ranks))
    assert seen[LATE]["reports"] == []
    for one in (*seen[:LATE], *seen[LATE + 1 :]):
        assert one["reports"], "five seconds, and one for each report"
        assert all(re.fullmatch(REPORT, text) for text in one["reports"])
    (text,) = {one["error"] for one in seen}
    assert "\n" not in text
    assert text.startswith(f"while ranks waited for 'the evaluation': rank {LATE} on ")
    assert "has made no progress for 3 s" in text or "has made no progress for 4 s" in text
    assert "parallel.silence_minutes" in text and "rollout 42/100 samples" in text
    assert f"logs/rank_0000{LATE}.log" in text


def meet_often() -> list[int]:
    """The keys in the store after few meetings, and after many; and those of a second start in the same store."""
    counts = []
    for _ in range(2):
        context = context_of(60.0, 60.0)
        for meetings in (2, 50):
            for number in range(meetings):
                context.barrier(f"work {number}")
            dist.barrier(context.host)
            counts.append(number_of_keys())
            dist.barrier(context.host)
        leave_layout()
    return counts


def test_meetings_leave_no_keys_behind_and_a_second_start_finds_none_of_the_first() -> None:
    for few, many, few_again, many_again in run_ranks(2, meet_often):
        assert many <= few + 1 and many_again <= few_again + 1  # the last rank may still be removing one


def test_a_rank_alone_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone:
        rank, size = staticmethod(lambda: 0), staticmethod(lambda: 1)

    meetings = Meetings(dist.HashStore(), Alone(), Patience(1.0, 1.0))  # type: ignore[arg-type]
    meetings.meet("nothing")
    meetings.close()


class Rank:
    """A rank that waits at a meeting, or works for ever: a process of its own, which a test may stop or kill."""

    def __init__(self, rank: int, size: int, port: int, patience: Patience) -> None:
        context = forkserver()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=wait_or_work, args=(theirs, environment_of(rank, size, port), patience))
        self.process.start()
        theirs.close()

    def says(self) -> Any:
        assert self.pipe.poll(120), "no word"
        return self.pipe.recv()


def wait_or_work(pipe: Connection, environment: dict[str, str], patience: Patience) -> None:
    os.environ.update(environment)
    context = context_of(collective_s=60.0)
    meetings = Meetings(dist.distributed_c10d._get_default_store(), context.host, patience)
    meetings.meet("the start")
    meetings.heartbeat.progress = lambda: "sync"
    pipe.send(os.getpid())
    if context.rank == LATE:
        time.sleep(600)
    pipe.send(error_of(lambda: meetings.meet("weights in the servers")))
    pipe.poll(600)  # until the test has heard of every rank


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[list[Rank]]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = [Rank(rank, 3, store.port, request.param) for rank in range(3)]
    yield started
    for rank in started:
        rank.process.kill()
        rank.process.join()


@pytest.mark.parametrize("ranks", [Patience(3600.0, 3600.0)], indirect=True)
@pytest.mark.fault(
    "a rank is killed while others wait for it",
    phase="all",
    seen="at once: `has ended`, and what it said last",
    lost="the steps since the last checkpoint",
)
def test_the_end_of_a_rank_is_seen_at_once(ranks: list[Rank]) -> None:
    processes = [rank.says() for rank in ranks]
    os.kill(processes[LATE], signal.SIGKILL)
    # No deadline is near: only the connection can have told.
    for rank in (ranks[0], ranks[2]):
        text = rank.says()
        assert "while ranks waited for 'weights in the servers': rank 1 on " in text
        assert "has ended; the last that it said: " in text and "\n" not in text


@pytest.mark.parametrize("ranks", [Patience(3600.0, 3.0)], indirect=True)
@pytest.mark.fault(
    "a rank is stopped (SIGSTOP), or its machine is gone",
    phase="all",
    seen="after `parallel.timeout_minutes`: `has given no sign of life`",
    lost="the steps since the last checkpoint",
)
def test_a_process_that_stands_still_is_given_up(ranks: list[Rank]) -> None:
    processes = [rank.says() for rank in ranks]
    os.kill(processes[LATE], signal.SIGSTOP)
    for rank in (ranks[0], ranks[2]):
        text = rank.says()
        assert "rank 1 on " in text and "has given no sign of life for " in text and "parallel.timeout_minutes" in text
