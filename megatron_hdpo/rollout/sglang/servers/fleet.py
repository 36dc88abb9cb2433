"""SGLang servers of one process: started together, restarted when they die, stopped together."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
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
REPORT_EVERY_S = 0.5
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

        report: gets a line on their state again and again. Raises ServerError as soon as a server has not come up; then
        none is left running.
        """
        begin = time.monotonic()
        waits: dict[Future[None], ServerProcess] = {}
        with ThreadPoolExecutor(max(len(self.processes), 1), thread_name_prefix="server-start") as pool:
            try:
                for process in self.processes:
                    process.start()
                waits = {pool.submit(process.wait_ready): process for process in self.processes}
                pending = set(waits)
                while pending:
                    report(self._state([waits[one] for one in waits if one in pending], time.monotonic() - begin))
                    ended, pending = wait(pending, REPORT_EVERY_S, return_when=FIRST_COMPLETED)
                    for one in ended:
                        one.result()
                        LOGGER.info("SGLang server %s answers after %.0f s", waits[one].url, time.monotonic() - begin)
                report(f"{len(self.processes)} of {len(self.processes)} servers of this rank answer")
            except BaseException:
                self.close()  # the other waits end with their servers
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

    def _state(self, pending: Sequence[ServerProcess], seconds: float) -> str:
        """Return how many servers answer after these seconds, and what the first of the others does."""
        count = f"{len(self.processes) - len(pending)} of {len(self.processes)} servers of this rank answer"
        others = ", ".join(str(process.launch.index) for process in pending)
        first = pending[0]
        return f"{count} after {seconds:.0f} s, not yet: {others}; {first.log}: {first.last_line() or 'nothing yet'}"
