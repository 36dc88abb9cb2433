"""Answers are read in other processes as they are here, and none is lost with a process that dies or hangs."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
import pytest
from fault_proxy import Answer, FaultProxy, changed, cut_off, streamed_until
from hostile_reader import FailsFirst
from one_engine import TOLERANCE, Weights, collect, completions, kept_away, one_engine, request
from server_tools import LiveServer

from megatron_hdpo.rollout.engine import EngineLostWeights
from megatron_hdpo.rollout.sglang import parsers as parsers_module
from megatron_hdpo.rollout.sglang.answers import Asked
from megatron_hdpo.rollout.sglang.parsers import Parsers
from megatron_hdpo.rollout.sglang.reading import RawAnswer, Reading, read_answer
from megatron_hdpo.rollout.sglang.stamps import RunStamp
from megatron_hdpo.types.loop_thread import LoopThread, to_its_end
from megatron_hdpo.types.rollouts import SamplingParams

VOCAB, TOKENS = 1000, 600
STAMP = RunStamp("0123456789abcdef")
ASKED = Asked(SamplingParams(TOKENS, stop_token_ids=(1,)), 3, VOCAB, STAMP)


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    loop = LoopThread("test")
    yield loop
    loop.close()


@pytest.fixture
def none_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer is read in a process."""
    monkeypatch.setattr(parsers_module, "SHORT_ANSWER", 0)


def answer(seed: int, ending: str = "length", **changes: Any) -> RawAnswer:
    """A streamed answer of 600 tokens, in pieces of 100."""
    draws = np.random.default_rng(seed)
    ids, values = draws.integers(2, VOCAB, TOKENS).tolist(), (-10 * draws.random(TOKENS)).tolist()
    raw = RawAnswer(streamed=True, ended=ending != "cut")
    for start in range(0, TOKENS, 100):
        rows = [[value, token, None] for value, token in zip(values[start:][:100], ids[start:][:100], strict=True)]
        last = start == TOKENS - 100
        meta = {"weight_version": STAMP.of(3), "completion_tokens": start + 100, "output_token_logprobs": rows}
        meta["finish_reason"] = {"type": ending} if last and ending != "cut" else None
        raw.add(b"data: " + orjson.dumps({"output_ids": ids[start:][:100], "meta_info": meta | changes}) + b"\n\n")
    return raw


def bits(reading: Reading) -> Any:
    """All of it, for comparison."""
    completion = {} if reading.completion is None else vars(reading.completion)
    values = [value.tobytes() if isinstance(value, np.ndarray) else value for value in completion.values()]
    return values, astuple(replace(reading, completion=None))


def read_all(loop: LoopThread, parsers: Parsers, answers: list[RawAnswer]) -> list[Reading]:
    async def read() -> list[Reading]:
        return await asyncio.gather(*(parsers.read(raw, ASKED) for raw in answers))

    return loop.run(read())


def test_readings_are_the_same_to_the_bit(loop: LoopThread, none_is_short: None) -> None:
    answers = [answer(seed) for seed in range(8)]
    answers += [answer(8, "cut"), answer(9, "abort"), answer(10, "stop"), answer(11, output_token_logprobs=[])]
    answers += [answer(12, weight_version="7"), RawAnswer(True, [b"data: {" + b" " * 20_000 + b"\n\n"], 20_009, True)]
    parsers = Parsers(2)
    try:
        found = read_all(loop, parsers, answers)
    finally:
        parsers.close()
    here = [read_answer(raw, ASKED) for raw in answers]
    assert list(map(bits, found)) == list(map(bits, here))
    assert [reading.ending for reading in here] == ["complete"] * 8 + [
        "cut", "aborted", "false", "false", "complete", "error",
    ]  # fmt: skip


def test_short_answers_start_no_process(loop: LoopThread) -> None:
    parsers = Parsers(2)
    short = RawAnswer(True, answer(0).pieces[:2], 0, ended=False)
    (reading,) = read_all(loop, parsers, [short])
    assert reading.ending == "cut" and reading.tokens == 200
    assert parsers._workers is not None and parsers._workers._pool is None
    parsers.close()
    (reading,) = read_all(loop, Parsers(0), [answer(0)])
    assert reading.ending == "complete"


@pytest.mark.parametrize("how", ["exit", "segfault", "hang"])
@pytest.mark.fault("a process that reads answers dies or hangs", phase="sampling", seen="nothing", lost="nothing")
def test_an_answer_over_which_a_process_ends_is_read_by_another(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    reader = FailsFirst(tmp_path / "calls", how)
    monkeypatch.setattr(parsers_module, "read_in_worker", reader)
    parsers = Parsers(1, time_limit_s=2.0 if how == "hang" else 600.0)
    try:
        found = read_all(loop, parsers, [answer(seed) for seed in range(3)])
    finally:
        parsers.close()
    assert list(map(bits, found)) == [bits(read_answer(answer(seed), ASKED)) for seed in range(3)]
    assert len(set(reader.calls())) >= 2 and len(reader.calls()) >= 4


def test_an_answer_that_ends_every_process_is_unread(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(parsers_module, "read_in_worker", FailsFirst(tmp_path / "calls", "exit", times=2))
    parsers = Parsers(1)
    (unread,) = read_all(loop, parsers, [answer(0)])
    assert unread.ending == "unread" and unread.completion is None and "exit code 1" in unread.problem
    assert "is given up, unread: the worker process died with exit code 1" in caplog.text
    (read,) = read_all(loop, parsers, [answer(0)])
    assert read.ending == "complete"
    parsers.close()
    (closed,) = read_all(loop, parsers, [answer(0)])
    assert closed.ending == "unread" and "closed" in closed.problem


def test_what_must_end_delays_a_cancellation(loop: LoopThread) -> None:
    ended = []

    async def work() -> None:
        await asyncio.sleep(0.2)
        ended.append(True)

    async def cancelled_twice() -> bool:
        task = asyncio.create_task(to_its_end(work()))
        for _ in range(2):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait({task})
        return task.cancelled()

    assert loop.run(cancelled_twice()) and ended == [True]


PARENT = """
import asyncio, sys
from pathlib import Path
from hostile_reader import FailsFirst
from megatron_hdpo.rollout.sglang import parsers
from megatron_hdpo.rollout.sglang.reading import RawAnswer
if __name__ == "__main__":
    parsers.SHORT_ANSWER = 0
    parsers.read_in_worker = FailsFirst(Path(sys.argv[1]), "hang")
    asyncio.run(parsers.Parsers(2, 600.0).read(RawAnswer(True, [b"x"], 1), None))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel kills the processes on Linux only")
def test_no_process_outlives_a_killed_trainer(tmp_path: Path) -> None:
    script, calls = tmp_path / "parent.py", FailsFirst(tmp_path / "calls", "hang").calls
    script.write_text(PARENT)
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(root / "tests" / "helpers"), str(root)])
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "calls")], env=os.environ | {"PYTHONPATH": path}
    )
    while not calls():
        assert parent.poll() is None
        time.sleep(0.05)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert calls()[0] in {process.pid for process in family}
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.usefixtures("none_is_short")
def test_samples_that_are_read_elsewhere(
    sglang_server: LiveServer, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process dies over the first answer: it is read again, and nothing is sampled again."""
    reader = FailsFirst(tmp_path / "calls", "exit")
    monkeypatch.setattr(parsers_module, "read_in_worker", reader)
    with one_engine([sglang_server.url], parser_processes=2, stream_interval=8) as (engine, push):
        push.push(weights.stream(1), 1)
        samples = completions(
            collect(engine, [request(n=8, tokens=60), request("q#0", n=2, tokens=20, top_logprobs=4)])
        )
        counted = engine.metrics()
    assert sorted(len(sample.token_ids) for sample in samples) == [20] * 2 + [60] * 8
    assert all(weights.worst(request().prompt_ids, sample, 1) < TOLERANCE for sample in samples)
    assert len(reader.calls()) >= 11 and counted["servers/failed_tries"] == 0


@pytest.mark.usefixtures("none_is_short")
@pytest.mark.fault(
    "two of them in a row die over one answer",
    phase="sampling",
    seen="a warning; the sample is requested again",
    lost="nothing",
)
def test_a_sample_whose_answer_is_unread_or_false_is_sampled_again(
    proxy: FaultProxy, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def falsified(answer: Answer) -> Answer:
        return answer | {"output_ids": answer["output_ids"][1:]}

    reader = FailsFirst(tmp_path / "calls", "exit", times=2)
    monkeypatch.setattr(parsers_module, "read_in_worker", reader)
    with one_engine([proxy.url], parser_processes=1, max_tries=3) as (engine, push):
        push.push(weights.stream(1), 1)
        proxy.faults["/generate"] = [None, changed(falsified)]
        (sample,) = completions(collect(engine, [request(tokens=20, temperature=0.0)]))
        counted = engine.metrics()
        assert weights.worst(request().prompt_ids, sample, 1) < TOLERANCE
        assert counted["servers/failed_tries"] == 2 and counted["servers/tripped"] == 0
        assert counted["servers/lost_tokens"] == len(sample.token_ids) - 1, "those of the false answer"
        proxy.faults["/generate"] = [changed(falsified)] * 3
        (result,) = collect(engine, [request(tokens=20)])
        assert not result.completions and "finished by 'length' after 19 of 20 tokens" in result.errors[0]


@pytest.mark.usefixtures("none_is_short")
def test_a_sample_that_is_dropped_while_it_is_read_is_continued(
    proxy: FaultProxy, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last server is lost with two samples: the one that is read first ends all requests, before the other is."""
    cuts = []

    async def cut(*_: Any) -> bool:
        cuts.append(True)
        while len(cuts) < 2:
            await asyncio.sleep(0.02)
        return False

    with one_engine([proxy.url], parser_processes=2, stream_interval=8, health_interval_s=0.3) as (engine, push):
        push.push(weights.stream(1), 1)
        (whole,) = completions(collect(engine, [request(tokens=100, temperature=0.0)]))
        monkeypatch.setattr(parsers_module, "read_in_worker", FailsFirst(tmp_path / "calls", "late"))
        proxy.faults["/generate"] = [streamed_until(3, cut)] * 2
        proxy.faults["/model_info"] = [cut_off()] * 4
        wanted = request(n=2, tokens=100, temperature=0.0)
        with kept_away(monkeypatch), pytest.raises(EngineLostWeights):
            collect(engine, [wanted])
        push.push(weights.stream(1), 1)
        samples = completions(collect(engine, [wanted]))
        counted = engine.metrics()
    assert [sample.token_ids.tolist() for sample in samples] == [whole.token_ids.tolist()] * 2
    assert counted["servers/continued"] == 2 and counted["servers/lost_tokens"] == 0
