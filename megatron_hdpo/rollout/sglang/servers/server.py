"""One SGLang server as a process: started, awaited, stopped, and never left behind."""

from __future__ import annotations

import contextlib
import datetime
import http.client
import logging
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from megatron_hdpo.rollout.sglang.servers import supervisor
from megatron_hdpo.rollout.sglang.servers.command import NoRoomError, ServerLaunch, server_command, server_environment
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.rollout.sglang.servers.ports import HeldPort, node_address

LOGGER = logging.getLogger(__name__)
POLL_S = 0.2
KILL_TIMEOUT_S = 60.0
"""A process with work on a GPU may need this long to die."""
SIGNAL_EVERY_S = 1.0
LOG_LINES = 30
LAST_BYTES, LINE_CHARACTERS = 4096, 80
PORT_TRIES = 3
"""Starts when a port is taken: SGLang chooses some ports itself, and another program may take them first."""


class ServerError(RuntimeError):
    """A server did not start, or died too often. The message has the path and the end of its log."""


class ServerProcess:
    """A server that belongs to this process and ends with it, even when this process is killed.

    folder: gets `sglang_<index>.log`, to which every start appends. The URL stays the same over restarts, except when
    another program took the port while the server was down.
    """

    def __init__(self, config: ServerConfig, launch: ServerLaunch, folder: Path) -> None:
        config.check(launch.device)
        self.config, self.launch = config, launch
        self.log = folder / f"sglang_{launch.index}.log"
        # In hex: SGLang turns its configuration file into arguments, and a key that began with "-" would be an option.
        self.api_key = secrets.token_hex(32) if config.api_key else None
        self.host = node_address() if config.host == "node" else config.host
        self._key_file = folder / f"sglang_{launch.index}.key.yaml" if self.api_key else None
        self._ports: list[HeldPort] = []
        self._port: int | None = None
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._closed = False
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Address of the server, known after `start`. Raises RuntimeError before."""
        if self._port is None:
            raise RuntimeError("the server has no URL before its first start")
        return f"http://{self.host}:{self._port}"

    @property
    def pid(self) -> int:
        """Process id of the supervisor, which is also the session id of all processes of the server."""
        if self._supervisor is None:
            raise RuntimeError("the server is not started")
        return self._supervisor.pid

    def start(self) -> None:
        """Start the process and return at once; do nothing if it runs. Raises ServerError once closed."""
        with self._lock:
            if self._closed:
                raise ServerError(f"SGLang server {self.launch.index} is closed")
            if not self.alive():
                self._start()

    def wait_ready(self) -> None:
        """Return when the server answers.

        Raises ServerError when the server died or did not answer within `start_timeout_s`; none of its processes is
        left then.
        """
        deadline = time.monotonic() + self.config.start_timeout_s
        for attempt in range(1, PORT_TRIES + 1):
            while self.alive():
                if self.answers():
                    return
                if time.monotonic() > deadline:
                    self.stop(now=True)
                    raise ServerError(self._report(f"did not answer within {self.config.start_timeout_s:g} s"))
                time.sleep(POLL_S)
            if attempt == PORT_TRIES or "address already in use" not in self._output().lower():
                break
            self._release_ports()
            self.start()
        raise ServerError(self._report(f"ended while it started, {self._exit()}"))

    def answers(self, timeout_s: float = 2.0) -> bool:
        """Return whether the server answers now. Never raises."""
        connection = http.client.HTTPConnection(self.host, self._port, timeout=timeout_s)
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            connection.request("GET", "/model_info", headers=headers)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def last_line(self) -> str:
        """Return the last line that this start wrote to the log, "" if there is none."""
        with self.log.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - LAST_BYTES))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip()[:LINE_CHARACTERS] for line in reversed(lines) if line.strip()), "")

    def alive(self) -> bool:
        """Return whether the server's main process runs; it may not answer yet, or hang."""
        return self._supervisor is not None and self._supervisor.poll() is None

    def request_stop(self, now: bool = False) -> None:
        """Send the stop signal that `stop` waits for."""
        if self._supervisor is not None and self.alive():
            self._supervisor.send_signal(signal.SIGINT if now else signal.SIGTERM)

    def stop(self, now: bool = False) -> None:
        """Stop the server and all its processes; return when none is left.

        It gets `stop_timeout_s` to end by itself, or, with `now`, is killed at once. It can be started again, at the
        same URL. Idempotent.
        """
        if self._supervisor is None:
            return
        deadline = time.monotonic() + self.config.stop_timeout_s + KILL_TIMEOUT_S
        while time.monotonic() < deadline:
            # Repeated, because Python may lose a signal that arrives while the supervisor still imports.
            self.request_stop(now)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._supervisor.wait(SIGNAL_EVERY_S)
                return
        LOGGER.warning("processes of SGLang server %d cannot be killed; see %s", self.launch.index, self.log)
        self._supervisor.kill()

    def close(self) -> None:
        """Stop for good, also while another thread starts it, and release ports and key. Idempotent."""
        with self._lock:
            self._closed = True
        self.stop()
        self._release_ports()
        if self._key_file is not None:
            self._key_file.unlink(missing_ok=True)

    def describe_end(self) -> str:
        """Return how a server that does not run ended: exit code, end of its log, path of its log."""
        return self._report(f"ended, {self._exit()}")

    def _start(self) -> None:
        if not self._ports:
            # TCPStore listens on all interfaces.
            self._ports = [HeldPort(self.host), HeldPort("")]
        self._port, nccl_port = (held.number for held in self._ports)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._write_key()
        try:
            command = server_command(
                config=self.config,
                launch=self.launch,
                host=self.host,
                port=self._port,
                nccl_port=nccl_port,
                key_file=self._key_file,
            )
        except NoRoomError as error:
            raise ServerError(f"SGLang server {self.launch.index}: {error}") from error
        guarded = [sys.executable, "-IS", supervisor.__file__, str(os.getpid()), str(self.config.stop_timeout_s)]
        environment = server_environment(self.config, self.launch.device, os.environ)
        with self.log.open("a") as log:
            now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
            log.write(f"=== server {self.launch.index} started {now}: {shlex.join(command)}\n")
            log.flush()
            self._log_start = log.tell()
            # In its own session: Ctrl-C in the terminal reaches only the trainer, which then stops its servers.
            self._supervisor = subprocess.Popen(
                guarded + command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def _release_ports(self) -> None:
        for port in self._ports:
            port.close()
        self._ports = []

    def _write_key(self) -> None:
        if self._key_file is not None:
            self._key_file.unlink(missing_ok=True)
            self._key_file.touch(mode=0o600)
            self._key_file.write_text(f"api-key: {self.api_key}\n")

    def _exit(self) -> str:
        code = self._supervisor.poll() if self._supervisor is not None else None
        if code is None:
            return "not at all"
        number = -code if code < 0 else code - 128
        return f"exit code {code}" + (f" ({signal.Signals(number).name})" if number in signal.valid_signals() else "")

    def _output(self) -> str:
        """Return what this start wrote to the log."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def _report(self, what: str) -> str:
        lines = [line for line in self._output().splitlines() if line.strip()][-LOG_LINES:]
        quoted = "\n".join(f"  | {line}" for line in lines) or "  | (nothing)"
        return f"SGLang server {self.launch.index} {what}. The end of its log, {self.log}:\n{quoted}"
