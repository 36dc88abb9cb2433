"""What tests of servers share: the stand-in for SGLang, and looking at processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_hdpo.rollout.sglang.engine import SGLangEngine
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.rollout.sglang.servers.server import ServerProcess

FAKE = Path(__file__).with_name("fake_sglang.py")


@dataclass(frozen=True)
class LiveServer:
    """A server that answers at `url`, and the Hugging Face folder that it loaded."""

    model: Path
    process: ServerProcess

    @property
    def url(self) -> str:
        """The same until another program takes the port of a dead server."""
        return self.process.url


def fake_config(folder: Path, behaviour: str = "", **settings: Any) -> ServerConfig:
    """Settings with an "interpreter" that runs the stand-in, whatever module it is told to run."""
    python = folder / "python"
    version = 'if [ "$1" = -c ]; then echo 9.9.9; exit; fi'
    python.write_text(f'#!/bin/sh\n{version}\nexec "{sys.executable}" "{FAKE}" "$@"\n')
    python.chmod(0o755)
    environment = {"FAKE": behaviour} | settings.pop("environment", {})
    return ServerConfig(
        python=python, environment=environment, **({"start_timeout_s": 120.0, "dtype": "float32"} | settings)
    )


def session_processes(session: int) -> list[psutil.Process]:
    """Processes of a session, zombies left out: a supervisor's id is the session of all that it looks after."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.Error):
            continue
    return found


def is_scheduler(process: psutil.Process) -> bool:
    """Whether it is a scheduler of SGLang, whose children replace their command line by a title."""
    return process.cmdline()[0].startswith("sglang::scheduler")


def servers_under(folder: Path) -> list[psutil.Process]:
    """Processes that write to a server's log in this folder: all of a server's, whoever their parent is now."""
    return [process for process in psutil.process_iter() if _writes_log_under(folder, process)]


def _writes_log_under(folder: Path, process: psutil.Process) -> bool:
    try:
        output = Path(os.readlink(f"/proc/{process.pid}/fd/1"))
    except OSError:
        return False
    return output.is_relative_to(folder) and output.name.startswith("sglang_")


def serves(engine: SGLangEngine) -> bool:
    """Return whether a server of the engine has the run's weights."""
    return any(replica.state == "serving" for replica in engine.replicas)


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> bool:
    """Whether `condition` came true in time, which is long: a loaded machine must not fail."""
    deadline = time.monotonic() + timeout_s
    while not (came := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return came
