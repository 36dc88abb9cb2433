"""SGLang servers of one process: started together, restarted when they die, stopped together."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tenacity import (
    Retrying,
    before_sleep_log,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_when_event_set,
    wait_exponential,
)

from megatron_hdpo.rollout.sglang.servers.command import ServerLaunch
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.rollout.sglang.servers.server import ServerError, ServerProcess

LOGGER = logging.getLogger(__name__)
BACKOFF = wait_exponential(multiplier=2, max=60)
"""Seconds between starts that fail."""
Report = Callable[[str], None]
"""Receiver of the state of servers that start."""


def no_report(state: str) -> None:
    """Ignore the state."""


class ServerFleet:
    """The servers of this process, numbered from 0 in the order of `launches`.

    launches: what each server loads and where it runs. No thread watches the servers: their user calls `restart`, which
    may run in its own thread; `close` ends it. folder: for logs.
    """

    def __init__(self, config: ServerConfig, launches: Sequence[ServerLaunch], folder: Path) -> None:
        self.config = config
        self.processes = [ServerProcess(config, launch, folder) for launch in launches]
        self.restarts = [0] * len(self.processes)
        self._closed = threading.Event()

    @property
    def urls(self) -> list[str]:
        """Addresses by server; a restart may change one."""
        return [process.url for process in self.processes]

    def start(self, report: Report = no_report) -> None:
        """Start all servers in parallel and return when all answer.

        report: gets a line on their state again and again. Raises ServerError when a server does not answer; then none
        is left running.
        """
        try:
            for process in self.processes:
                process.start()
            for ready, process in enumerate(self.processes):
                process.wait_ready(partial(self._report_start, report, ready))
            report(f"{len(self.processes)} of {len(self.processes)} servers of this rank answer")
        except BaseException:
            self.close()
            raise

    def restart(self, index: int) -> None:
        """Kill server `index` if it still runs (it may hang), start it, and wait until it answers.

        It then has the weights of its model folder. A failed start is retried with growing delays. Raises ServerError
        when `max_restarts` are used up.
        """
        process = self.processes[index]
        end = f"SGLang server {index} hangs." if process.alive() else process.describe_end()
        left = self.config.max_restarts - self.restarts[index]
        if left <= 0:
            raise ServerError(f"restarted max_restarts={self.config.max_restarts} times already. {end}")
        LOGGER.warning("%s", end)
        retrying = Retrying(
            stop=stop_after_attempt(left) | stop_when_event_set(self._closed),
            sleep=sleep_using_event(self._closed),
            wait=BACKOFF,
            retry=retry_if_exception_type(ServerError),
            before_sleep=before_sleep_log(LOGGER, logging.WARNING),
            reraise=True,
        )
        retrying(self._start_again, index)

    def exhausted(self, index: int) -> bool:
        """Return whether server `index` has used up its restarts."""
        return self.restarts[index] >= self.config.max_restarts

    def close(self) -> None:
        """Stop all servers in parallel and release their ports; none starts again. Idempotent."""
        self._closed.set()
        for process in self.processes:
            process.request_stop()
        for process in self.processes:
            process.close()

    def _start_again(self, index: int) -> None:
        self.restarts[index] += 1
        self.processes[index].stop(now=True)
        self.processes[index].start()
        self.processes[index].wait_ready()

    def _report_start(self, report: Report, ready: int) -> None:
        process = self.processes[ready]
        count = f"{ready} of {len(self.processes)} servers of this rank answer"
        report(f"{count}; {process.log}: {process.last_line() or 'nothing yet'}")
