"""Real SGLang servers on a CPU, and the check that none is left behind.

Their environment is made by `make sglang-env`; MEGATRON_HDPO_SGLANG_PYTHON names an interpreter elsewhere. Without it
these tests are skipped, except in continuous integration (CI or MEGATRON_HDPO_REQUIRE_SGLANG set), where they fail.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from fault_proxy import FaultProxy, fault_proxy
from one_engine import Weights
from server_tools import LiveServer, servers_under

from megatron_hdpo.rollout.sglang.servers.command import ServerLaunch
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.rollout.sglang.servers.server import ServerProcess

ROOT = Path(__file__).parents[3]
SHIM = ROOT / "tests" / "sglang_cpu" / "shim"
CHARACTERS = "0123456789+=#-"


@pytest.fixture(scope="session", autouse=True)
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After the last test no process of any server runs: each, whoever its parent is now, writes to a server's log."""
    yield
    base = tmp_path_factory.getbasetemp()
    _, left = psutil.wait_procs(servers_under(base), timeout=60)  # those that were killed take a while to end
    listening = {process.pid: _listening(process) for process in left}
    for process in left:
        process.kill()
    assert not left, f"processes of servers are left, listening on the ports {listening}: {left}"


@pytest.fixture(scope="session")
def sglang_config() -> ServerConfig:
    """Settings of a small server in float32 on the CPU. Its processes are forked, where SGLang would spawn them: they
    take a third of the processor's time to start."""
    return ServerConfig(
        python=_sglang_python(),
        dtype="float32",
        max_total_tokens=16_384,
        max_running_requests=16,
        environment={"PYTHONPATH": str(SHIM), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "SGLANG_SHIM_FORK": "1"},
        start_timeout_s=900.0,
        stop_timeout_s=0.0,  # on a CPU nothing is gained by an end of its own, which may take 20 s
    )


@pytest.fixture(scope="session")
def stock_config(sglang_config: ServerConfig) -> ServerConfig:
    """The same, with processes that are started as SGLang starts them: for tests of processes."""
    environment = {name: value for name, value in sglang_config.environment.items() if name != "SGLANG_SHIM_FORK"}
    return sglang_config.model_copy(update={"environment": environment})


@pytest.fixture(scope="session")
def sglang_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: Llama of 2 layers, 4 heads, 17 tokens, 128 positions."""
    from recipes import make_model

    return make_model(tmp_path_factory.mktemp("models") / "sglang-tiny", characters=CHARACTERS)


@pytest.fixture(scope="session")
def sglang_server(
    sglang_config: ServerConfig, sglang_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """One real server for all tests. A test that changes its weights or pauses it puts that right itself."""
    process = ServerProcess(sglang_config, ServerLaunch(sglang_model, "cpu"), tmp_path_factory.mktemp("sglang"))
    try:
        process.start()
        process.wait_ready()
        yield LiveServer(sglang_model, process)
    finally:
        process.close()


@pytest.fixture
def start_server(sglang_config: ServerConfig, sglang_model: Path, tmp_path: Path) -> Iterator[Callable[[], LiveServer]]:
    """Starts a server of the test's own, which ends with it."""
    process = ServerProcess(sglang_config, ServerLaunch(sglang_model, "cpu", index=1), tmp_path)

    def start() -> LiveServer:
        process.start()
        process.wait_ready()
        return LiveServer(sglang_model, process)

    yield start
    process.close()


def _sglang_python() -> Path:
    python = Path(os.environ.get("MEGATRON_HDPO_SGLANG_PYTHON") or ROOT / ".venv-sglang" / "bin" / "python")
    if not python.exists():
        needed = bool(os.environ.get("CI") or os.environ.get("MEGATRON_HDPO_REQUIRE_SGLANG"))
        (pytest.fail if needed else pytest.skip)(f"no SGLang at {python}: run `make sglang-env`")
    return python


def _listening(process: psutil.Process) -> list[int]:
    try:
        connections = process.net_connections(kind="inet")
    except psutil.Error:
        return []
    return [connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN]


@pytest.fixture(scope="module")
def weights(sglang_server: LiveServer) -> Weights:
    """The weights of the shared server's model, to be sent to it and compared with."""
    return Weights(sglang_server.model)


@pytest.fixture
def proxy(sglang_server: LiveServer) -> Iterator[FaultProxy]:
    """A way to the shared server on which faults can be laid."""
    with fault_proxy(sglang_server.url) as proxy:
        yield proxy
