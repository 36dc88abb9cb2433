"""Real servers, for what the stand-in cannot show: SGLang's own processes, ports, answers and ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from server_tools import LiveServer, session_processes, wait_until

from megatron_hdpo.rollout.sglang.command import Launch
from megatron_hdpo.rollout.sglang.server import ServerError, ServerProcess
from megatron_hdpo.rollout.sglang.server_config import ServerConfig
from megatron_hdpo.rollout.sglang.servers import Servers

OWNER = """
import sys, time
from pathlib import Path
from megatron_hdpo.rollout.sglang.command import Launch
from megatron_hdpo.rollout.sglang.server import ServerProcess
from megatron_hdpo.rollout.sglang.server_config import ServerConfig

config = ServerConfig.model_validate_json(sys.argv[1])
server = ServerProcess(config, Launch(Path(sys.argv[2]), "cpu"), Path(sys.argv[3]))
server.start()
server.wait_ready()
print(server.pid, flush=True)
time.sleep(600)
"""


def generate(url: str, key: str | None = None) -> dict[str, Any]:
    """The answer to a request for three tokens."""
    body = {"input_ids": [3, 4, 5], "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = requests.post(f"{url}/generate", json=body, headers=headers, timeout=60)
    answer.raise_for_status()
    return answer.json()


def is_scheduler(process: psutil.Process) -> bool:
    """SGLang's children replace their command line by a title."""
    return process.cmdline()[0].startswith("sglang::scheduler")


def test_a_server_serves_the_model_it_was_given(sglang_server: LiveServer) -> None:
    info = requests.get(f"{sglang_server.url}/model_info", timeout=10).json()
    assert info["tokenizer_path"] == str(sglang_server.model)  # model_path follows updates from disk
    assert len(generate(sglang_server.url)["output_ids"]) == 3
    server = requests.get(f"{sglang_server.url}/server_info", timeout=10).json()
    assert (server["dtype"], server["max_total_num_tokens"]) == ("float32", 16_384)


def test_the_interpreter_tells_its_version(sglang_config: ServerConfig) -> None:
    assert sglang_config.check_interpreter("cpu").release[:2] == (0, 5)


@pytest.mark.slow
def test_a_model_that_is_not_there_is_reported_with_the_servers_own_words(
    sglang_config: ServerConfig, tmp_path: Path
) -> None:
    server = ServerProcess(sglang_config, Launch(tmp_path / "no-such-model", "cpu"), tmp_path)
    server.start()
    session = server.pid
    with pytest.raises(ServerError, match="ended while it started, exit code 1") as caught:
        server.wait_ready()
    assert str(tmp_path / "no-such-model") in str(caught.value).partition("The end of its log")[2]
    assert session_processes(session) == []
    server.close()


@pytest.mark.slow
def test_a_server_whose_scheduler_is_killed_is_replaced_and_one_without_supervisor_ends(
    sglang_config: ServerConfig, sglang_model: Path, tmp_path: Path
) -> None:
    config = sglang_config.model_copy(update={"api_key": True})
    servers = Servers(config, [Launch(sglang_model, "cpu")], tmp_path)
    process = servers.processes[0]
    try:
        servers.start()
        url = servers.urls[0]
        with pytest.raises(requests.HTTPError, match="401"):
            generate(url)
        session = process.pid
        next(p for p in session_processes(session) if is_scheduler(p)).kill()
        assert wait_until(lambda: not process.alive(), 60), "a server without its scheduler must end"
        assert session_processes(session) == []
        servers.restart(0)
        assert servers.urls == [url] and len(generate(url, process.api_key)["output_ids"]) == 3
        session = process.pid
        os.kill(session, signal.SIGKILL)
        assert wait_until(lambda: session_processes(session) == []), "a server without its supervisor must end"
    finally:
        servers.close()


@pytest.mark.slow
def test_no_process_outlives_an_owner_that_is_killed(
    sglang_config: ServerConfig, sglang_model: Path, tmp_path: Path
) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, sglang_config.model_dump_json(), sglang_model, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    with owner.stdout:
        supervisor = int(owner.stdout.readline())
    assert len(session_processes(supervisor)) >= 4
    owner.kill()
    owner.wait()
    assert wait_until(lambda: session_processes(supervisor) == [])


@pytest.mark.slow
def test_a_port_lost_while_the_server_loads_is_changed(
    sglang_config: ServerConfig, sglang_model: Path, tmp_path: Path
) -> None:
    server = ServerProcess(sglang_config, Launch(sglang_model, "cpu"), tmp_path)
    server.start()
    before = server.url
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", int(before.rpartition(":")[2])))
        thief.listen()
        server.wait_ready()
    try:
        assert server.url != before and len(generate(server.url)["output_ids"]) == 3
    finally:
        server.close()


@pytest.mark.slow
def test_two_tensor_parallel_ranks_serve_on_a_cpu(
    sglang_config: ServerConfig, sglang_model: Path, tmp_path: Path
) -> None:
    config = sglang_config.model_copy(update={"tensor_parallel": 2})
    server = ServerProcess(config, Launch(sglang_model, "cpu"), tmp_path)
    try:
        server.start()
        server.wait_ready()
        assert len(generate(server.url)["output_ids"]) == 3
        assert sum(is_scheduler(p) for p in session_processes(server.pid)) == 2
    finally:
        server.close()
