"""Two servers of the run's own: one is killed or hangs, the other goes on, and both end with the run."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from one_engine import TOLERANCE, Weights, collect, completions, one_engine, request
from server_tools import session_processes, wait_until

from megatron_hdpo.rollout.engine import EngineLostWeights
from megatron_hdpo.rollout.sglang.engine import SGLangEngine
from megatron_hdpo.rollout.sglang.reading import RawAnswer
from megatron_hdpo.rollout.sglang.servers.command import ServerLaunch
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.rollout.sglang.servers.fleet import ServerFleet
from megatron_hdpo.rollout.sglang.weights.push import WeightPush
from megatron_hdpo.types.rollouts import Completion, GenerationRequest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine_of_two(
    sglang_config: ServerConfig, sglang_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[SGLangEngine, WeightPush, ServerFleet]]:
    launches = [ServerLaunch(sglang_model, "cpu", index=index) for index in range(2)]
    servers = ServerFleet(sglang_config, launches, tmp_path_factory.mktemp("two"))
    servers.start()
    with one_engine(servers.urls, servers, health_interval_s=1.0, health_timeout_s=15.0) as (engine, push):
        yield engine, push, servers
    assert not [p for process in servers.processes for p in session_processes(process.pid)]


def signal_group(servers: ServerFleet, index: int, number: signal.Signals) -> None:
    """To all processes of a server but its supervisor."""
    session = servers.processes[index].pid
    for process in session_processes(session):
        if process.pid != session:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue


def states(engine: SGLangEngine) -> list[str]:
    return [replica.state for replica in engine.replicas]


def batch(name: str) -> list[GenerationRequest]:
    """32 samples that take a while, some for each server."""
    return [request(f"{name}{i}#0", n=4, tokens=110, prompt=(2, 3, 4 + i)) for i in range(8)]


def submit_and_freeze(engine: SGLangEngine, servers: ServerFleet, index: int, name: str) -> list[GenerationRequest]:
    """Half of the samples may be half done when the server stops; of the other half it will not say anything."""
    wanted = batch(name)
    engine.submit(wanted[:4])
    time.sleep(0.2)
    signal_group(servers, index, signal.SIGSTOP)
    engine.submit(wanted[4:])
    assert wait_until(lambda: bool(engine.replicas[index].in_flight)), "it was asked"
    return wanted


def check_complete(engine: SGLangEngine, weights: Weights, wanted: list[GenerationRequest], version: int) -> None:
    """No sample is lost, none is there twice, and all are of the weights' distribution."""
    samples: dict[str, list[Completion]] = {r.request_id: [] for r in wanted}
    for result in engine.results():
        if result is not None:
            samples[result.request_id] += completions([result])
    for one in wanted:
        assert len(samples[one.request_id]) == 4
        assert all(weights.worst(one.prompt_ids, s, version) < TOLERANCE for s in samples[one.request_id])


@pytest.mark.fault(
    "a server is killed amid its samples",
    phase="sampling",
    seen="`servers/taken_out`, `servers/continued`; it is restarted",
    lost="nothing",
)
def test_samples_of_a_server_that_is_killed_go_on_from_their_tokens(
    engine_of_two: Any, sglang_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed when some tokens of four unfinished samples have come."""
    engine, push, servers = engine_of_two
    engine.config.stream_interval = 4
    weights = Weights(sglang_model)
    push.push(weights.stream(2), 2)
    assert states(engine) == ["serving", "serving"]
    wanted = request("g#0", n=8, tokens=110, temperature=0.0)
    (whole,) = completions(collect(engine, [replace(wanted, sampling=replace(wanted.sampling, n=1))]))
    engine.metrics()
    arrived = Counter[int]()
    add = RawAnswer.add

    def counted(self: RawAnswer, piece: bytes) -> None:
        arrived[id(self)] += piece.count(b"\n\n")
        add(self, piece)

    monkeypatch.setattr(RawAnswer, "add", counted)
    engine.submit([wanted])
    assert wait_until(lambda: sum(pieces >= 3 for pieces in list(arrived.values())) >= 4)
    killed = next(replica.index for replica in engine.replicas if replica.in_flight)
    signal_group(servers, killed, signal.SIGKILL)
    samples = completions([result for result in engine.results() if result is not None])
    found = engine.metrics()
    assert found["servers/continued"] >= 1 and found["servers/kept_tokens"] >= 3 and found["servers/taken_out"] == 1
    assert len(samples) == 8
    check_equal_to(whole, samples, 2)
    assert all(weights.worst(wanted.prompt_ids, sample, 2) < TOLERANCE for sample in samples)

    after = ["stale" if index == killed else "serving" for index in range(2)]
    assert wait_until(lambda: states(engine) == after, 900), engine.replicas
    assert found["servers/restarts"] + engine.metrics()["servers/restarts"] == 1
    assert len(completions(collect(engine, [request(n=3)]))) == 3, "a server without the run's weights is not asked"
    push.push(weights.stream(3), 3)
    assert states(engine) == ["serving", "serving"]
    samples = completions(collect(engine, [request(f"q{i}#0", n=2) for i in range(6)]))
    assert all(weights.worst(request().prompt_ids, s, 3) < TOLERANCE for s in samples)


def check_equal_to(whole: Completion, samples: list[Completion], version: int) -> None:
    for sample in samples:
        assert sample.token_ids.tolist() == whole.token_ids.tolist() and sample.finish_reason == "length"
        np.testing.assert_allclose(sample.logprobs, whole.logprobs, atol=TOLERANCE)
        assert set(sample.weight_versions.tolist()) == {version}


@pytest.mark.fault(
    "a server hangs; then the last one dies with its supervisor",
    phase="sampling",
    seen="a warning; when no server has the weights, all ranks send them again",
    lost="nothing",
)
def test_the_other_server_takes_over_from_one_that_hangs_and_when_it_is_lost_too_the_weights_must_come_again(
    engine_of_two: Any, sglang_model: Path
) -> None:
    """The other one is lost by the death of its supervisor, while the first is being replaced or has no weights yet."""
    engine, push, servers = engine_of_two
    weights = Weights(sglang_model)
    push.push(weights.stream(4), 4)
    starts = log_of(servers, 1).count("=== server 1 started")
    wanted = submit_and_freeze(engine, servers, 1, "r")
    check_complete(engine, weights, wanted, 4)
    assert states(engine) != ["serving", "serving"] and states(engine)[0] == "serving"

    supervisor = servers.processes[0].pid
    submit_and_freeze(engine, servers, 0, "s")
    left = [process for process in session_processes(supervisor) if process.pid != supervisor]
    os.kill(supervisor, signal.SIGKILL)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.resume()
    with pytest.raises(EngineLostWeights):
        list(engine.results())
    assert wait_until(lambda: not any(map(is_alive, left))), "a server without its supervisor must end"
    report = push.push(weights.stream(4), 4)  # waits for both to be back
    assert report.servers == 2 and states(engine) == ["serving", "serving"]
    assert log_of(servers, 1).count("=== server 1 started") == starts + 1
    samples = completions(collect(engine, [request(f"t{i}#0", n=2) for i in range(6)]))
    assert all(weights.worst(request().prompt_ids, s, 4) < TOLERANCE for s in samples)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def log_of(servers: ServerFleet, index: int) -> str:
    return servers.processes[index].log.read_text()
