"""All reward services of a recipe, asked in one event loop that starts when the first of them is needed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from megatron_hdpo.rewards.functions import HttpService
from megatron_hdpo.rewards.judgement import Judgement
from megatron_hdpo.types.loop_thread import LoopThread
from megatron_hdpo.types.problem import Problem

if TYPE_CHECKING:
    from megatron_hdpo.rewards.service import RewardService


class Services:
    """The services that a process asks. Any thread may call; nothing is started where there is no service."""

    def __init__(self, configs: Sequence[HttpService]) -> None:
        self._configs = configs
        self._lock = threading.Lock()
        self._thread: LoopThread | None = None
        self._opened: dict[str, RewardService] = {}
        self._closed = False

    def submit(self, config: HttpService, problem: Problem, response: str) -> Future[Judgement]:
        """Ask one of the services for the value of a response. The future never fails."""
        try:
            return self._service(config).submit(problem, response)
        except (ValueError, RuntimeError) as error:
            failed: Future[Judgement] = Future()
            failed.set_result(Judgement(None, str(error), 0.0))
            return failed

    def problems(self) -> list[str]:
        """Return for each service that cannot be used its name, and why."""
        return list(self._problems())

    def close(self) -> None:
        """Ask no more; what was not answered comes back as failed. Idempotent."""
        with self._lock:
            self._closed = True
            opened, self._opened = self._opened, {}
            thread, self._thread = self._thread, None
        for service in opened.values():
            service.close()
        if thread is not None:
            thread.close()

    def _problems(self) -> Iterator[str]:
        for config in self._configs:
            try:
                self._service(config).check()
            except ValueError as error:
                yield f"{config.function_name}: {error}"

    def _service(self, config: HttpService) -> RewardService:
        """Return the service, opened at its first use.

        Raises ValueError when its key is missing, RuntimeError after `close`.
        """
        from megatron_hdpo.rewards.service import RewardService  # imports aiohttp, which takes long

        with self._lock:
            if self._closed:
                raise RuntimeError("the reward services are closed")
            if self._thread is None:
                self._thread = LoopThread("reward services")
            if config.function_name not in self._opened:
                self._opened[config.function_name] = RewardService(config, self._thread, os.environ)
            return self._opened[config.function_name]
