"""A reward service on loopback, in a thread of this process, that breaks as it is told."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from megatron_hdpo.types.loop_thread import LoopThread

Fault = Callable[[web.Request], Awaitable[web.StreamResponse]]


def value_of(response: str) -> float:
    """The value of a response, by which tests know what must come back: exact in binary."""
    return sum(map(ord, response)) % 64 / 64


@dataclass
class StandInService:
    """Answers each request with `value_of` its response, unless `fault(request, times)` gives something else.

    times: how often this sample has been asked for before. asked: all requests, in order.
    """

    fault: Callable[[dict[str, Any], int], Fault | None] = lambda request, times: None
    delay_s: float = 0.0
    port: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    health: int = 200
    _now: int = 0
    _times: Counter[str] = field(default_factory=Counter)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/judge"

    @contextmanager
    def running(self) -> Iterator[StandInService]:
        """Serve while the block runs."""
        thread = LoopThread("reward service")
        runner = thread.run(self._start())
        try:
            yield self
        finally:
            thread.run(runner.cleanup())
            thread.close()

    async def _start(self) -> web.AppRunner:
        app = web.Application()
        app.add_routes([web.post("/judge", self._judge), web.get("/health", self._health)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        self.port = self.port or free_port()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        return runner

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=self.health)

    async def _judge(self, request: web.Request) -> web.StreamResponse:
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            said = await request.json()
            self.asked.append(said)
            self.headers.append(dict(request.headers))
            times = self._times[said["sample"]]
            self._times[said["sample"]] += 1
            await asyncio.sleep(self.delay_s)
            fault = self.fault(said, times)
            if fault is not None:
                return await fault(request)
            return web.json_response({"reward": value_of(said["response"]), "feedback": f"seen {said['response']}"})
        finally:
            self._now -= 1


def status(code: int, text: str = "", **headers: str) -> Fault:
    """An answer with this status. headers: their names with _ in place of -."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=code, text=text, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return answer


def body(text: str | bytes) -> Fault:
    """An answer of status 200 with this body."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=text.encode() if isinstance(text, str) else text, content_type="application/json")

    return answer


async def hang(request: web.Request) -> web.StreamResponse:
    """No answer, ever."""
    await asyncio.sleep(3600)
    raise AssertionError


async def close(request: web.Request) -> web.StreamResponse:
    """No answer: the connection is closed."""
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def die_midway(request: web.Request) -> web.StreamResponse:
    """Half of an answer, then a closed connection."""
    whole = json.dumps({"reward": 1.0, "feedback": "x" * 100}).encode()
    answer = web.StreamResponse(headers={"Content-Length": str(len(whole))})
    await answer.prepare(request)
    await answer.write(whole[:20])
    assert request.transport is not None
    request.transport.close()
    return answer


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
