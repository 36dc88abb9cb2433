"""Several servers of one process: side by side, restarted when one dies, given up in the end. With the stand-in."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from server_tools import fake_config, session_processes, wait_until
from tenacity import wait_fixed, wait_none

from megatron_hdpo.rollout.sglang.servers import fleet
from megatron_hdpo.rollout.sglang.servers.command import ServerLaunch
from megatron_hdpo.rollout.sglang.servers.fleet import ServerFleet
from megatron_hdpo.rollout.sglang.servers.server import ServerError

MakeServers = Callable[..., ServerFleet]


@pytest.fixture
def make_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeServers]:
    """Makes two servers that end with the test; failed starts are repeated at once."""
    monkeypatch.setattr(fleet, "BACKOFF", wait_none())
    made: list[ServerFleet] = []

    def make(behaviour: str = "", **settings: Any) -> ServerFleet:
        launches = [ServerLaunch(tmp_path, "cpu", index) for index in range(2)]
        made.append(ServerFleet(fake_config(tmp_path, behaviour, **settings), launches, tmp_path))
        return made[-1]

    yield make
    for servers in made:
        servers.close()


def swallow(restart: Callable[[int], None]) -> Callable[[int], None]:
    """The error a restart ends with when the servers are closed is for the thread that asked for it."""

    def quietly(index: int) -> None:
        with contextlib.suppress(ServerError):
            restart(index)

    return quietly


def kill(servers: ServerFleet, index: int) -> None:
    """SIGKILL to the main process of a server."""
    psutil.Process(servers.processes[index].pid).children()[0].kill()
    assert wait_until(lambda: not servers.processes[index].alive())


def test_servers_load_side_by_side(make_servers: MakeServers, tmp_path: Path) -> None:
    """Neither answers before both are loading."""
    loading = tmp_path / "loading"
    loading.mkdir()
    servers = make_servers(environment={"FAKE_MEETS": f"{loading}:2"})
    servers.start()
    assert len(set(servers.urls)) == 2 and all(process.answers() for process in servers.processes)


def test_the_state_of_starting_servers_is_reported(make_servers: MakeServers, tmp_path: Path) -> None:
    """The stand-ins print nothing and wait for a third one, which comes when their state was reported."""
    loading = tmp_path / "loading"
    loading.mkdir()
    states: list[str] = []

    def report(state: str) -> None:
        states.append(state)
        (loading / "third").touch()

    servers = make_servers(environment={"FAKE_MEETS": f"{loading}:3"})
    servers.start(report)
    waiting = f"0 of 2 servers of this rank answer after 0 s, not yet: 0, 1; {tmp_path}/sglang_0.log: nothing yet"
    assert states[0] == waiting
    assert states[-1] == "2 of 2 servers of this rank answer"


def test_the_last_line_of_a_log_is_that_of_the_latest_start(make_servers: MakeServers) -> None:
    (process, _) = make_servers("dies").processes
    for line in ("an old line", "ValueError: no such model"):
        process.log.write_text(f"{line}\n\n")
        with pytest.raises(ServerError):
            process.start()
            process.wait_ready()
        assert process.last_line() == "ValueError: no such model"


def test_a_dead_server_answers_again_when_its_restart_is_over(
    make_servers: MakeServers, caplog: pytest.LogCaptureFixture
) -> None:
    servers = make_servers()
    servers.start()
    urls, survivor = servers.urls, servers.processes[0].pid
    kill(servers, 1)
    with caplog.at_level(logging.WARNING):
        servers.restart(1)
    assert servers.processes[1].answers() and servers.urls == urls
    assert servers.processes[0].pid == survivor
    assert "SGLang server 1 ended, exit code 137 (SIGKILL)" in caplog.text


def test_a_server_that_hangs_is_replaced_on_request(make_servers: MakeServers) -> None:
    servers = make_servers()
    servers.start()
    hanging = psutil.Process(servers.processes[0].pid).children()[0]
    hanging.suspend()
    assert servers.processes[0].alive() and not servers.processes[0].answers(timeout_s=0.2)
    servers.restart(0)
    assert servers.processes[0].answers() and not hanging.is_running()


@pytest.mark.fault(
    "a server dies more often than `max_restarts`",
    phase="all",
    seen="the reason and the end of its log",
    lost="the steps since the last checkpoint, when it was the last server",
)
def test_deaths_beyond_max_restarts_end_the_run(make_servers: MakeServers) -> None:
    servers = make_servers(max_restarts=1)
    servers.start()
    kill(servers, 0)
    servers.restart(0)
    kill(servers, 0)
    with pytest.raises(ServerError, match=r"max_restarts=1 times already. SGLang server 0 ended(.|\n)*SIGKILL"):
        servers.restart(0)


def test_starts_that_fail_count_as_restarts(make_servers: MakeServers) -> None:
    servers = make_servers(max_restarts=3)
    servers.start()
    servers.config.environment["FAKE"] = "dies"
    kill(servers, 0)
    with pytest.raises(ServerError, match="no such model"):
        servers.restart(0)
    assert servers.restarts == [3, 0]
    assert servers.processes[0].log.read_text().count("=== server 0 started") == 4


def test_a_restart_under_way_in_a_thread_ends_with_close(
    make_servers: MakeServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "BACKOFF", wait_fixed(600))
    servers = make_servers()
    servers.start()
    process = servers.processes[0]
    servers.config.environment["FAKE"] = "silent"
    loading, waiting = (threading.Thread(target=swallow(servers.restart), args=[index]) for index in range(2))
    loading.start()
    assert wait_until(lambda: process.log.read_text().count("=== server 0 started") == 2 and process.alive())
    servers.config.environment["FAKE"] = "dies"
    kill(servers, 1)
    waiting.start()
    assert wait_until(lambda: servers.processes[1].log.read_text().count("no such model") == 1)
    servers.close()
    for thread in (loading, waiting):
        thread.join(120)
        assert not thread.is_alive()
    assert not any(process.alive() for process in servers.processes)


def test_a_closed_server_does_not_start(make_servers: MakeServers) -> None:
    servers = make_servers()
    servers.close()
    with pytest.raises(ServerError, match="closed"):
        servers.start()


def test_one_server_that_cannot_start_takes_the_others_along(make_servers: MakeServers) -> None:
    servers = make_servers()
    servers.processes[1].config = fake_config(servers.processes[1].log.parent, "dies")
    with pytest.raises(ServerError, match="SGLang server 1 ended while it started"):
        servers.start()
    assert not any(process.alive() for process in servers.processes)


def test_close_ends_all_and_may_be_called_again(make_servers: MakeServers) -> None:
    servers = make_servers()
    servers.start()
    sessions = [process.pid for process in servers.processes]
    servers.close()
    assert [session_processes(session) for session in sessions] == [[], []]
    servers.close()
