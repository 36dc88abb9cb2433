"""Two servers of the run's own: one is killed or hangs, the other goes on, and both end with the run."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from one_engine import Weights, collect, completions, one_engine, request
from server_tools import session_processes, wait_until

from megatron_hdpo.rollout.engine import EngineLostWeights
from megatron_hdpo.rollout.sglang.command import Launch
from megatron_hdpo.rollout.sglang.engine import SGLangEngine
from megatron_hdpo.rollout.sglang.push import WeightPush
from megatron_hdpo.rollout.sglang.server_config import ServerConfig
from megatron_hdpo.rollout.sglang.servers import Servers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine_of_two(
    sglang_config: ServerConfig, sglang_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[SGLangEngine, WeightPush, Servers]]:
    launches = [Launch(sglang_model, "cpu", index=index) for index in range(2)]
    servers = Servers(sglang_config, launches, tmp_path_factory.mktemp("two"))
    servers.start()
    with one_engine(servers.urls, servers, health_interval_s=1.0, health_timeout_s=15.0) as (engine, push):
        yield engine, push, servers
    assert not [p for process in servers.processes for p in session_processes(process.pid)]


def stop_group(servers: Servers, index: int, number: signal.Signals) -> None:
    """All processes of a server but its supervisor."""
    session = servers.processes[index].pid
    for process in session_processes(session):
        if process.pid != session:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue


def states(engine: SGLangEngine) -> list[str]:
    return [replica.state for replica in engine.replicas]


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_the_other_server_takes_over(engine_of_two: Any, sglang_model: Path, blow: signal.Signals) -> None:
    engine, push, servers = engine_of_two
    weights = Weights(sglang_model)
    push.push(weights.stream(2), 2)
    assert states(engine) == ["serving", "serving"]
    wanted = [request(f"p{i}#0", n=4, tokens=110, prompt=(2, 3, 4 + i)) for i in range(8)]
    engine.submit(wanted)
    time.sleep(0.2)
    stop_group(servers, 0, blow)
    samples = {r.request_id: [] for r in wanted}
    for result in engine.results():
        if result is not None:
            samples[result.request_id] += completions([result])
    for one in wanted:
        assert len(samples[one.request_id]) == 4, "no sample is lost, none is there twice"
        assert all(weights.worst(one.prompt_ids, s, 2) < 1e-5 for s in samples[one.request_id])
    assert wait_until(lambda: states(engine) == ["stale", "serving"], 120), engine.health()
    assert len(completions(collect(engine, [request(n=3)]))) == 3, "a server without the run's weights is not asked"
    push.push(weights.stream(3), 3)
    assert states(engine) == ["serving", "serving"]
    samples = completions(collect(engine, [request(f"q{i}#0", n=2) for i in range(6)]))
    assert all(weights.worst(request().prompt_ids, s, 3) < 1e-5 for s in samples)


def test_when_all_are_lost_the_weights_must_come_again(engine_of_two: Any, sglang_model: Path) -> None:
    engine, push, servers = engine_of_two
    weights = Weights(sglang_model)
    push.push(weights.stream(4), 4)
    engine.submit([request(f"p{i}#0", n=4, tokens=110) for i in range(4)])
    time.sleep(0.2)
    for index in range(2):
        stop_group(servers, index, signal.SIGKILL)
    with pytest.raises(EngineLostWeights):
        list(engine.results())
    report = push.push(weights.stream(4), 4)  # waits for both to be back
    assert report.servers == 2 and states(engine) == ["serving", "serving"]
    (sample,) = completions(collect(engine, [request()]))
    assert weights.worst(request().prompt_ids, sample, 4) < 1e-5
