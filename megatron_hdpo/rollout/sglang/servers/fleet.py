"""The SGLang servers that this process owns: started together, watched on request, restarted when they die."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
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

from megatron_hdpo.rollout.sglang.servers.command import Launch
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.rollout.sglang.servers.server import ServerError, ServerProcess

LOGGER = logging.getLogger(__name__)
BACKOFF = wait_exponential(multiplier=2, max=60)
"""Seconds between starts that fail."""


class Servers:
    """`launches` says what each server loads and where it runs; servers are counted from 0 in this order. No thread
    watches: whoever needs the servers asks. `restart` may run in a thread of its own; `close` ends it.
    """

    def __init__(self, config: ServerConfig, launches: Sequence[Launch], folder: Path) -> None:
        self.config = config
        self.processes = [ServerProcess(config, launch, folder) for launch in launches]
        self.restarts = [0] * len(self.processes)
        self._closed = threading.Event()

    @property
    def urls(self) -> list[str]:
        """By server; a restart may change one."""
        return [process.url for process in self.processes]

    def start(self) -> None:
        """Start all of them side by side and return when all answer. Raises ServerError, with none left running."""
        try:
            for process in self.processes:
                process.start()
            for process in self.processes:
                process.wait_ready()
        except BaseException:
            self.close()
            raise

    def restart(self, index: int) -> None:
        """Kill server `index` if it lives (it may hang), start it, and wait for it; it has the weights of its model
        folder then. A start that fails is tried again, later and later. Raises ServerError when `max_restarts` are used
        up.
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
        """Whether server `index` has used up its restarts."""
        return self.restarts[index] >= self.config.max_restarts

    def close(self) -> None:
        """End all servers, side by side, and give back their ports; none starts again. Idempotent."""
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
