"""Real servers, for what the stand-in cannot show: SGLang's own processes, ports, answers and ends."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from server_tools import LiveServer, is_scheduler, session_processes, wait_until

from megatron_hdpo.rollout.sglang.servers.command import ServerLaunch
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.rollout.sglang.servers.server import ServerError, ServerProcess

OWNER = """
import sys, time
from pathlib import Path
from megatron_hdpo.rollout.sglang.servers.command import ServerLaunch
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.rollout.sglang.servers.fleet import ServerFleet

config = ServerConfig.model_validate_json(sys.argv[1])
servers = ServerFleet(config, [ServerLaunch(Path(sys.argv[2]), "cpu")], Path(sys.argv[3]))
server = servers.processes[0]
server.start()
print(server.url, flush=True)
sys.stdin.readline()
server.wait_ready()
print(server.url, server.pid, sep="\\n", flush=True)
sys.stdin.readline()
servers.restart(0)
print(server.url, server.pid, sep="\\n", flush=True)
time.sleep(600)
"""


def generate(url: str, key: str | None = None) -> dict[str, Any]:
    """The answer to a request for three tokens."""
    body = {"input_ids": [3, 4, 5], "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = requests.post(f"{url}/generate", json=body, headers=headers, timeout=60)
    answer.raise_for_status()
    return answer.json()


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
    stock_config: ServerConfig, tmp_path: Path
) -> None:
    server = ServerProcess(stock_config, ServerLaunch(tmp_path / "no-such-model", "cpu"), tmp_path)
    server.start()
    session = server.pid
    with pytest.raises(ServerError, match="ended while it started, exit code 1") as caught:
        server.wait_ready()
    assert str(tmp_path / "no-such-model") in str(caught.value).partition("The end of its log")[2]
    assert session_processes(session) == []
    server.close()


@pytest.mark.slow
def test_the_life_of_a_server(stock_config: ServerConfig, sglang_model: Path, tmp_path: Path) -> None:
    """Its port is lost while it loads and changed; its key keeps others out; when its scheduler is killed it ends, and
    is replaced at its URL; and no process outlives an owner that is killed."""
    config = stock_config.model_copy(update={"api_key": True})
    with owner_of_a_server(config, sglang_model, tmp_path) as owner:
        lost_url = owner.said()
        with stolen_port(lost_url):
            owner.go_on()
            url, supervisor = owner.said(), int(owner.said())
        key = (tmp_path / "sglang_0.key.yaml").read_text().removeprefix("api-key: ").strip()
        assert url != lost_url and len(generate(url, key)["output_ids"]) == 3
        with pytest.raises(requests.HTTPError, match="401"):
            generate(url)

        assert len(session_processes(supervisor)) >= 4
        next(p for p in session_processes(supervisor) if is_scheduler(p)).kill()
        assert wait_until(lambda: session_processes(supervisor) == []), "a server without its scheduler must end"
        owner.go_on()
        same_url, supervisor = owner.said(), int(owner.said())
        assert same_url == url and len(generate(url, key)["output_ids"]) == 3

        assert len(session_processes(supervisor)) >= 4
        owner.process.kill()
        assert wait_until(lambda: session_processes(supervisor) == [])


@dataclass(frozen=True)
class Owner:
    """A process that owns a server, and talks by lines."""

    process: subprocess.Popen[str]

    def said(self) -> str:
        """Return its next line, stripped."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        """Let it take its next step."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)


@contextmanager
def owner_of_a_server(config: ServerConfig, model: Path, folder: Path) -> Iterator[Owner]:
    """Run OWNER until the end of the block."""
    command = [sys.executable, "-c", OWNER, config.model_dump_json(), model, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Owner(process)
        finally:
            process.kill()


@contextmanager
def stolen_port(url: str) -> Iterator[None]:
    """Listen at the port of a server that still loads."""
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", int(url.rpartition(":")[2])))
        thief.listen()
        yield
