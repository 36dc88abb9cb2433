"""Samples asked of an sglang-router before two servers: versions right, also after one of them has died."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator

import psutil
import pytest
from one_engine import TOLERANCE, Weights, collect, completions, one_engine, request
from server_tools import LiveServer, session_processes, wait_until

from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.rollout.sglang.servers.ports import HeldPort

pytestmark = pytest.mark.slow


@pytest.fixture
def workers(
    sglang_config: ServerConfig, sglang_server: LiveServer, start_server: Callable[[], LiveServer]
) -> list[LiveServer]:
    """Two servers, of which the first may be killed."""
    probe = [sglang_config.interpreter, "-c", "import sglang_router"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip(f"{sglang_config.interpreter} has no sglang-router")
    return [start_server(), sglang_server]


@pytest.fixture
def router(sglang_config: ServerConfig, workers: list[LiveServer]) -> Iterator[str]:
    port = HeldPort("127.0.0.1")
    number = port.number
    port.close()
    command = [sglang_config.interpreter, "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
    command += ["--port", str(number), "--worker-urls", *(worker.url for worker in workers)]
    environment = os.environ | sglang_config.environment  # it imports SGLang, which needs the shim
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{number}"
    try:
        assert wait_until(lambda: answers(url))
        yield url
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url + "/health", timeout=10).status == 200
    except OSError:
        return False


def test_a_router_before_two_servers(workers: list[LiveServer], router: str) -> None:
    weights = Weights(workers[0].model)
    urls = [worker.url for worker in workers]
    with one_engine(urls, router=router, health_interval_s=1.0, request_timeout_s=20.0, max_tries=8) as (engine, push):
        for version in (1, 2):
            push.push(weights.stream(version), version)
            samples = completions(collect(engine, [request(f"p{i}#0", n=2) for i in range(6)]))
            assert len(samples) == 12
            assert all(weights.worst(request().prompt_ids, sample, version) < TOLERANCE for sample in samples)
        for process in session_processes(workers[0].process.pid):
            if process.pid != workers[0].process.pid:
                kill(process)
        time.sleep(1.0)
        push.push(weights.stream(3), 3)
        samples = completions(collect(engine, [request(f"q{i}#0", n=2) for i in range(4)]))
        assert len(samples) == 8
        assert all(weights.worst(request().prompt_ids, sample, 3) < TOLERANCE for sample in samples)


def kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
