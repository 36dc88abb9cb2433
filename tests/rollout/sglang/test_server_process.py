"""Server processes, with a stand-in for SGLang that starts in a tenth of a second and misbehaves on demand."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from server_tools import fake_config, session_processes, wait_until

from megatron_hdpo.rollout.sglang.servers.command import ServerLaunch
from megatron_hdpo.rollout.sglang.servers.server import ServerError, ServerProcess

MakeServer = Callable[..., ServerProcess]

OWNER = """
import sys, time
from pathlib import Path
from server_tools import fake_config
from megatron_hdpo.rollout.sglang.servers.command import ServerLaunch
from megatron_hdpo.rollout.sglang.servers.server import ServerProcess

folder = Path(sys.argv[1])
server = ServerProcess(fake_config(folder, sys.argv[2]), ServerLaunch(folder, "cpu"), folder)
server.start()
server.wait_ready()
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[MakeServer]:
    """Makes servers that end with the test."""
    made: list[ServerProcess] = []

    def make(behaviour: str = "", **settings: Any) -> ServerProcess:
        made.append(
            ServerProcess(fake_config(tmp_path, behaviour, **settings), ServerLaunch(tmp_path, "cpu"), tmp_path)
        )
        return made[-1]

    yield make
    for server in made:
        server.stop(now=True)
        server.close()


def get_status(server: ServerProcess, headers: dict[str, str] | None = None) -> int:
    """HTTP status of a question without the server's own help."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=5)
    connection.request("GET", "/model_info", headers=headers or {})
    status = connection.getresponse().status
    connection.close()
    return status


def test_a_server_is_started_answers_and_is_stopped(make_server: MakeServer) -> None:
    server = make_server()
    assert not server.alive()
    server.start()
    server.wait_ready()
    assert server.alive() and server.answers() and get_status(server) == 200
    session = server.pid
    assert len(session_processes(session)) >= 3, "supervisor, server and its child"
    server.stop()
    assert not server.alive() and not server.answers() and session_processes(session) == []
    server.stop()


def test_a_server_that_runs_is_not_started_twice(make_server: MakeServer) -> None:
    server = make_server()
    server.start()
    first = server.pid
    server.start()
    assert server.pid == first


def test_a_signal_that_gets_lost_is_sent_again(make_server: MakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = make_server()
    server.start()
    server.wait_ready()
    assert server._supervisor is not None
    session, send, sent = server.pid, server._supervisor.send_signal, []

    def lose_the_first(number: int) -> None:
        sent.append(number)
        if len(sent) > 1:
            send(number)

    monkeypatch.setattr(server._supervisor, "send_signal", lose_the_first)
    server.stop(now=True)
    assert len(sent) == 2 and session_processes(session) == []


def test_a_stopped_server_comes_back_at_its_url(make_server: MakeServer) -> None:
    server = make_server()
    server.start()
    server.wait_ready()
    url = server.url
    server.stop()
    server.start()
    server.wait_ready()
    assert server.url == url and get_status(server) == 200
    assert server.log.read_text().count("=== server 0 started") == 2, "the log is appended to"


@pytest.mark.parametrize("behaviour", ["stubborn", "escape"])
def test_what_ignores_a_polite_end_is_killed(make_server: MakeServer, behaviour: str) -> None:
    server = make_server(behaviour, stop_timeout_s=0.3)
    server.start()
    server.wait_ready()
    family = psutil.Process(server.pid).children(recursive=True)
    assert len(family) >= 2
    server.stop()
    assert not any(process.is_running() for process in family)


def test_stop_at_once_does_not_wait_for_a_polite_end(make_server: MakeServer) -> None:
    server = make_server("stubborn", stop_timeout_s=600.0)
    server.start()
    server.wait_ready()
    session, begin = server.pid, time.monotonic()
    server.stop(now=True)
    assert time.monotonic() - begin < 300 and session_processes(session) == []


def test_the_children_of_a_killed_server_do_not_outlive_it(make_server: MakeServer) -> None:
    server = make_server("escape")
    server.start()
    server.wait_ready()
    main, child = psutil.Process(server.pid).children(recursive=True)
    main.kill()
    assert wait_until(lambda: not server.alive())
    assert not child.is_running()
    assert "exit code 137 (SIGKILL)" in server.describe_end()


def test_a_server_ends_with_a_supervisor_that_is_killed(make_server: MakeServer) -> None:
    server = make_server()
    server.start()
    server.wait_ready()
    main = psutil.Process(server.pid).children()[0]
    os.kill(server.pid, signal.SIGKILL)
    assert wait_until(lambda: not main.is_running() or main.status() == psutil.STATUS_ZOMBIE)
    for process in session_processes(server.pid):
        process.kill()


@pytest.mark.parametrize("behaviour", ["stubborn", "escape"])
def test_servers_end_when_their_owner_is_killed(tmp_path: Path, behaviour: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, tmp_path, behaviour], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert owner.stdout is not None
    with owner.stdout:
        supervisor = psutil.Process(int(owner.stdout.readline()))
    family = [supervisor, *supervisor.children(recursive=True)]
    assert len(family) >= 3
    owner.kill()
    owner.wait()
    assert wait_until(lambda: not any(process.is_running() for process in family))


@pytest.mark.fault(
    "a server dies while it starts", phase="start", seen="the end of its log, exit code 2", lost="nothing"
)
def test_a_server_that_dies_while_it_starts_tells_how(make_server: MakeServer) -> None:
    server = make_server("dies")
    server.start()
    with pytest.raises(ServerError, match=r"exit code 7") as caught:
        server.wait_ready()
    assert "ValueError: no such model" in str(caught.value) and str(server.log) in str(caught.value)
    assert not server.alive()


def test_a_report_tells_of_the_last_start_alone(make_server: MakeServer) -> None:
    server = make_server("dies")
    server.log.write_text("what an earlier run left\n")
    server.start()
    with pytest.raises(ServerError) as caught:
        server.wait_ready()
    assert "earlier run" not in str(caught.value) and "earlier run" in server.log.read_text()


def test_a_server_that_never_answers_is_given_up_and_killed(make_server: MakeServer) -> None:
    server = make_server("silent", start_timeout_s=0.5)
    server.start()
    session = server.pid
    with pytest.raises(ServerError, match=r"did not answer within 0\.5 s"):
        server.wait_ready()
    assert session_processes(session) == []


@pytest.mark.fault(
    "another program has the server's port", phase="start", seen="a line; another port is taken", lost="nothing"
)
def test_a_port_that_another_program_took_is_changed(make_server: MakeServer, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    server = make_server(environment={"FAKE_WAITS_FOR": str(taken)})
    server.start()
    before = server.url
    with socket.socket() as thief:
        # What the hold cannot keep out: a program that sets SO_REUSEADDR and names this very port.
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", int(before.rpartition(":")[2])))
        thief.listen()
        taken.touch()
        server.wait_ready()
    assert server.url != before and get_status(server) == 200


def test_a_key_keeps_others_out_and_is_on_no_command_line(make_server: MakeServer) -> None:
    server = make_server(api_key=True)
    server.start()
    server.wait_ready()
    assert server.api_key is not None and get_status(server) == 401
    assert re.fullmatch("[0-9a-f]{64}", server.api_key), "SGLang would take a key that begins with - for an option"
    assert get_status(server, {"Authorization": f"Bearer {server.api_key}"}) == 200
    key_file = server.log.with_suffix(".key.yaml")
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    commands = [" ".join(process.cmdline()) for process in session_processes(server.pid)]
    assert commands and not any(server.api_key in command for command in commands)
    assert server.api_key not in server.log.read_text()
    server.close()
    assert not key_file.exists()
