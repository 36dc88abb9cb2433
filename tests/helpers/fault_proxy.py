"""A proxy before a real server that does to chosen requests what networks and broken servers do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import aiohttp
import orjson
from aiohttp import web

Answer = dict[str, Any]
Fault = Callable[[web.Request, "FaultProxy"], Any]


class FaultProxy:
    """faults: by path, a list whose first entry is what befalls the next request there (None: nothing); when the list
    is empty requests pass. asked: bodies by path, in order."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.faults: dict[str, list[Fault | None]] = {}
        self.asked: dict[str, list[Answer]] = {}
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.asked.setdefault(request.path, []).append(orjson.loads(body) if body else {})
        waiting = self.faults.get(request.path)
        fault = waiting.pop(0) if waiting else None
        if fault is not None:
            answer = await fault(request, self)
            if answer is not None:
                return answer
        return await self.forward(request, body)

    async def forward(
        self, request: web.Request, body: bytes, change: Callable[[Answer], Answer] | None = None
    ) -> web.Response:
        headers = {"Content-Type": "application/json"}
        async with (
            aiohttp.ClientSession() as session,
            session.request(request.method, self.target + request.path_qs, data=body, headers=headers) as answer,
        ):
            content = await answer.read()
            streamed = answer.content_type == "text/event-stream"
            if change is not None:
                whole = orjson.dumps(change(assembled(content) if streamed else orjson.loads(content)))
                content = b"data: %s\n\n" % whole if streamed else whole
            return web.Response(body=content, status=answer.status, content_type=answer.content_type)


def assembled(stream: bytes) -> Answer:
    """The answer that a stream of increments makes up."""
    events = [event.removeprefix(b"data: ") for event in stream.split(b"\n\n")]
    pieces = [orjson.loads(event) for event in events if event not in (b"", b"[DONE]")]
    if "meta_info" not in pieces[-1]:
        return pieces[-1]
    rows = [row for piece in pieces for row in piece["meta_info"].get("output_token_logprobs", [])]
    ids = [token for piece in pieces for token in piece["output_ids"]]
    return pieces[-1] | {"output_ids": ids, "meta_info": pieces[-1]["meta_info"] | {"output_token_logprobs": rows}}


def status(code: int) -> Fault:
    """An error answer."""

    async def fault(request: web.Request, proxy: FaultProxy) -> web.Response:
        return web.Response(status=code, text='{"error": {"message": "injected"}}')

    return fault


def delay(seconds: float) -> Fault:
    """The request reaches the server late."""

    async def fault(request: web.Request, proxy: FaultProxy) -> None:
        await asyncio.sleep(seconds)

    return fault


def held(released: threading.Event) -> Fault:
    """The request reaches the server when the test allows it."""

    async def fault(request: web.Request, proxy: FaultProxy) -> None:
        while not released.is_set():
            await asyncio.sleep(0.02)

    return fault


def cut_off() -> Fault:
    """The connection breaks without an answer."""

    async def fault(request: web.Request, proxy: FaultProxy) -> web.Response:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    return fault


def streamed_until(pieces: int, then: Callable[[web.Request, FaultProxy, Answer], Awaitable[bool]]) -> Fault:
    """After some pieces of a streamed answer `then` happens; the stream goes on if it returns True, and is cut off
    otherwise."""

    async def fault(request: web.Request, proxy: FaultProxy) -> web.StreamResponse:
        body = await request.read()
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        asked = orjson.loads(body)
        async with aiohttp.ClientSession() as session, session.post(proxy.target + request.path, json=asked) as origin:
            assert origin.content_type == "text/event-stream", await origin.read()
            seen, held = 0, b""
            async for piece in origin.content.iter_any():
                *events, held = (held + piece).split(b"\n\n")
                for event in events:
                    await answer.write(event + b"\n\n")
                    seen += 1
                    if seen == pieces and not await then(request, proxy, asked):
                        assert request.transport is not None
                        request.transport.close()
                        return answer
        return answer

    return fault


def changed(change: Callable[[Answer], Answer]) -> Fault:
    """The server's answer, falsified."""

    async def fault(request: web.Request, proxy: FaultProxy) -> web.Response:
        return await proxy.forward(request, await request.read(), change)

    return fault


@contextmanager
def fault_proxy(target: str) -> Iterator[FaultProxy]:
    """A proxy at a port of its own, in a thread."""
    with serving(FaultProxy(target)) as proxy:
        yield proxy


Proxy = TypeVar("Proxy", bound=FaultProxy)


@contextmanager
def serving(proxy: Proxy) -> Iterator[Proxy]:
    """Serves at a port of its own, in a thread."""
    loop, started = asyncio.new_event_loop(), threading.Event()

    async def serve() -> web.AppRunner:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", proxy.handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        proxy.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]
        started.set()
        return runner

    def work() -> None:
        runner = loop.run_until_complete(serve())
        loop.run_forever()
        loop.run_until_complete(runner.shutdown())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert started.wait(60)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
