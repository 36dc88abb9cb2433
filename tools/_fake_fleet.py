"""Many fake SGLang servers in one process, a port each: made-up tokens at a modelled speed, and faults by a plan."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import random
import resource
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import orjson
from _canned import information, missing, piece
from aiohttp import web

SLOW = 0.3
"""Speed of a slow server, in speeds of the others."""
Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class ServerModel:
    """Model of a server's speed and of the lengths of responses.

    slots: most requests that run at once; others queue. first_s, each_s: a decode step takes first_s, and each_s more
    for every running request, and gives each of them a token. prefill_steps: steps that a prompt costs when it is not
    in the cache. prompt_tokens: length of every prompt. median, sigma: of response lengths, log-normal, in tokens.
    """

    slots: int
    first_s: float
    each_s: float
    prefill_steps: float
    prompt_tokens: int
    median: float
    sigma: float
    seed: int

    def step_s(self, running: int) -> float:
        """Return the seconds of a decode step."""
        return self.first_s + self.each_s * running

    @property
    def tokens_per_s(self) -> float:
        """Return the tokens per second of a server with all slots in use."""
        return self.slots / self.step_s(self.slots)

    def length(self, sample: str, most: int) -> int:
        """Return the length of a sample's response, the same on every server."""
        drawn = random.Random(f"{self.seed}/{sample}").lognormvariate(math.log(self.median), self.sigma)
        return max(1, min(round(drawn), most))


@dataclass(frozen=True)
class Fault:
    """Fault of one server for a while.

    kind: `slow` (SLOW), `failing` (500 to every sample), `hung` (answers nothing, then goes on), `dead` (connections
    are cut; then it is back without weights).
    """

    server: int
    kind: str
    begin_s: float
    seconds: float


def capacity(model: ServerModel, servers: int, faults: Sequence[Fault], until_s: float) -> float:
    """Return the tokens that the servers could sample until a time, with all slots in use outside of their faults."""
    lost = 0.0
    for fault in faults:
        seconds = min(fault.begin_s + fault.seconds, until_s) - min(fault.begin_s, until_s)
        lost += seconds * (1 - SLOW if fault.kind == "slow" else 1.0)
    return model.tokens_per_s * (servers * until_s - lost)


class Ended(Exception):
    """A request was aborted, or lost with its server."""


class Job:
    """A request while it waits for one thing after another. end: why it ended early."""

    def __init__(self) -> None:
        self.end = ""
        self._future: asyncio.Future[None] | None = None

    async def wait(self, future: asyncio.Future[None]) -> None:
        """Wait for a future. Raises Ended when the request ends early."""
        self._future = future
        try:
            await future
        except asyncio.CancelledError:
            if not self.end:
                raise
        if self.end:
            raise Ended

    def stop(self, end: str) -> None:
        """End the request early."""
        self.end = self.end or end
        if self._future is not None:
            self._future.cancel()


class DecodeClock:
    """Counts the decode steps of a server, which take longer the more requests run.

    work: steps times running requests so far. Times are those of the loop.
    """

    def __init__(self, model: ServerModel) -> None:
        self.model, self.running, self.work = model, 0, 0.0
        self._speed = 1.0
        self._steps, self._counted_at = 0.0, _now()
        self._due: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def steps(self) -> float:
        """Return the steps so far."""
        self._count()
        return self._steps

    def reaches(self, steps: float) -> asyncio.Future[None]:
        """Return a future of the time when so many steps are done."""
        self._count()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._due, (steps, next(self._order), future))
        self._plan()
        return future

    def change(self, running: int = 0, speed: float | None = None) -> None:
        """Add running requests, or set the speed in speeds of a well server; 0 stops it."""
        self._count()
        self.running += running
        self._speed = self._speed if speed is None else speed
        self._plan()

    def _count(self) -> None:
        now = _now()
        if self.running:
            passed = (now - self._counted_at) * self._speed / self.model.step_s(self.running)
            self._steps += passed
            self.work += passed * self.running
        self._counted_at = now

    def _plan(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._due and self._speed:
            wait = (self._due[0][0] - self._steps) * self.model.step_s(max(1, self.running)) / self._speed
            self._timer = asyncio.get_running_loop().call_later(max(0.0, wait), self._wake)

    def _wake(self) -> None:
        self._count()
        while self._due and self._due[0][0] <= self._steps + 1e-6:
            future = heapq.heappop(self._due)[2]
            if not future.done():
                future.set_result(None)
        self._plan()


class FakeServer:
    """One server. hits, prompts: requests whose prompt was in the cache, and all. most_queued: its longest queue."""

    def __init__(self, model: ServerModel) -> None:
        self.model, self.clock = model, DecodeClock(model)
        self.fault = ""
        self.hits = self.prompts = self.most_queued = 0
        self._awake = asyncio.Event()
        self._jobs: dict[str, Job] = {}
        self._queue: deque[asyncio.Future[None]] = deque()
        self._stamps = [(0.0, "default")]
        self._cached: set[bytes] = set()
        self._routes = {
            "/abort_request": self._abort,
            "/begin_weight_update": missing,
            "/continue_generation": self._continue,
            "/generate": self._generate,
            "/health": self._say_well,
            "/model_info": self._say_well,
            "/pause_generation": self._pause,
            "/server_info": information,
            "/update_weights_from_tensor": self._update,
            "/v1/loads": self._tell_load,
        }

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer a request as the server's fault has it."""
        if self.fault == "hung":
            await self._awake.wait()
        if self.fault == "dead":
            return _cut_off(request)
        return await self._routes[request.path](request)

    def begin(self, fault: str) -> None:
        """Begin a fault."""
        self.fault = fault
        if fault == "slow":
            self.clock.change(speed=SLOW)
        elif fault == "hung":
            self._awake.clear()
            self.clock.change(speed=0.0)
        elif fault == "dead":
            for job in list(self._jobs.values()):
                job.stop("lost")

    def recover(self) -> None:
        """End the fault."""
        if self.fault == "dead":
            self._stamps = [(self.clock.steps, "default")]
            self._cached.clear()
        self.fault = ""
        self.clock.change(speed=1.0)
        self._awake.set()

    def tally(self) -> dict[str, float]:
        """Return what the server has done so far."""
        self.clock.change()
        return {"work": self.clock.work, "hits": self.hits, "prompts": self.prompts, "most_queued": self.most_queued}

    @property
    def stamp(self) -> str:
        """Return the stamp of the weights that it holds."""
        return self._stamps[-1][1]

    async def _say_well(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.stamp})

    async def _tell_load(self, request: web.Request) -> web.Response:
        return web.json_response({"loads": [{"num_waiting_reqs": len(self._queue)}]})

    async def _pause(self, request: web.Request) -> web.Response:
        self.clock.change(speed=0.0)
        return web.json_response({})

    async def _continue(self, request: web.Request) -> web.Response:
        self.clock.change(speed=SLOW if self.fault == "slow" else 1.0)
        return web.json_response({})

    async def _update(self, request: web.Request) -> web.Response:
        asked = orjson.loads(await request.read())
        if "weight_version" in asked:
            self._stamps.append((self.clock.steps, asked["weight_version"]))
            self._cached.clear()
        return web.json_response({"success": True, "message": ""})

    async def _abort(self, request: web.Request) -> web.Response:
        job = self._jobs.get(orjson.loads(await request.read())["rid"])
        if job is not None:
            job.stop("aborted")
        return web.json_response({})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        asked = orjson.loads(await request.read())
        if self.fault == "failing":
            return web.json_response({"error": {"message": "injected"}}, status=500)
        job, rid = Job(), asked.get("rid", "trial")
        self._jobs[rid] = job
        try:
            return await (self._streamed if asked.get("stream") else self._whole)(request, asked, job)
        except (Ended, ConnectionError):
            return _cut_off(request)
        finally:
            self._jobs.pop(rid, None)

    async def _whole(self, request: web.Request, asked: dict[str, Any], job: Job) -> web.StreamResponse:
        pieces: list[dict[str, Any]] = []

        async def send(part: dict[str, Any]) -> None:
            pieces.append(part)

        await self._sample(asked, job, send)
        return web.json_response(pieces[-1])

    async def _streamed(self, request: web.Request, asked: dict[str, Any], job: Job) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)

        async def send(part: dict[str, Any]) -> None:
            await answer.write(b"data: " + orjson.dumps(part) + b"\n\n")

        await self._sample(asked, job, send)
        await answer.write(b"data: [DONE]\n\n")
        return answer

    async def _sample(self, asked: dict[str, Any], job: Job, send: Send) -> None:
        """Send the tokens of a sample when their steps are done, or those until an abort."""
        tokens, end = self._rest(asked)
        interval = asked["sampling_params"].get("stream_interval", tokens)
        begin, sent = math.inf, 0
        try:
            async with self._slot(job):
                begin = self.clock.steps + self._prefill(asked["input_ids"])
                while sent < tokens:
                    until = min(sent + interval, tokens)
                    await job.wait(self.clock.reaches(begin + until))
                    finish = {"type": end} if until == tokens else None
                    await send(piece(sent, until, self.stamp, finish, self._spans(begin, until)))
                    sent = until
        except Ended:
            if job.end == "lost":
                raise
            until = min(tokens, max(sent, math.floor(max(0.0, self.clock.steps - begin))))
            finish = {"type": "abort", "message": "aborted"}
            await send(piece(sent, until, self.stamp, finish, self._spans(begin, until)))

    def _rest(self, asked: dict[str, Any]) -> tuple[int, str]:
        """Return the tokens that a request lacks of its sample, and why it then ends."""
        done = max(0, len(asked["input_ids"]) - self.model.prompt_tokens)
        most = done + asked["sampling_params"]["max_new_tokens"]
        length = self.model.length(asked.get("rid", "").rpartition("-")[0], most)
        return max(1, length - done), "stop" if length < most else "length"

    def _prefill(self, ids: Sequence[int]) -> float:
        """Return the steps until the first one of decoding."""
        prompt = orjson.dumps(ids[: self.model.prompt_tokens])
        hit = prompt in self._cached
        self.prompts += 1
        self.hits += hit
        self._cached.add(prompt)
        return self.model.prefill_steps * (len(ids) / self.model.prompt_tokens - hit)

    def _spans(self, begin: float, tokens: int) -> list[dict[str, Any]]:
        """Return the stamp of each of a request's tokens; its decoding began after `begin` steps."""
        starts = [max(0, math.floor(max(0.0, at - begin))) for at, _ in self._stamps] + [tokens]
        spans = zip(self._stamps, starts, starts[1:], strict=False)
        return [
            {"version": stamp, "start": start, "end": min(end, tokens)}
            for (_, stamp), start, end in spans
            if start < min(end, tokens)
        ]

    @asynccontextmanager
    async def _slot(self, job: Job) -> AsyncIterator[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(future)
        self._admit()
        self.most_queued = max(self.most_queued, len(self._queue))
        try:
            await job.wait(future)
            yield
        finally:
            if future.done() and not future.cancelled():
                self.clock.change(running=-1)
                self._admit()

    def _admit(self) -> None:
        while self._queue and self.clock.running < self.model.slots:
            future = self._queue.popleft()
            if not future.done():
                self.clock.change(running=1)
                future.set_result(None)


def serve(connection: Connection, count: int, model: ServerModel) -> None:
    """Send the addresses of `count` servers, and answer requests until this process is ended."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    asyncio.run(_serve(connection, count, model))


async def _serve(connection: Connection, count: int, model: ServerModel) -> None:
    servers: dict[int, FakeServer] = {}

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.path == "/tally":
            return web.json_response([server.tally() for server in servers.values()])
        if request.path == "/faults":
            _plan_faults(
                list(servers.values()), [Fault(**fault) for fault in orjson.loads(await request.read())["all"]]
            )
            return web.json_response({})
        if request.transport is None:
            return web.Response()
        return await servers[request.transport.get_extra_info("sockname")[1]].answer(request)

    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=5.0)  # as SGLang's
    await runner.setup()
    for _ in range(count):
        listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        await web.SockSite(runner, listening, backlog=1024).start()
        servers[listening.getsockname()[1]] = FakeServer(model)
    connection.send([f"http://127.0.0.1:{port}" for port in servers])
    await asyncio.Event().wait()


def _plan_faults(servers: Sequence[FakeServer], faults: Sequence[Fault]) -> None:
    loop = asyncio.get_running_loop()
    for fault in faults:
        server = servers[fault.server]
        loop.call_later(fault.begin_s, server.begin, fault.kind)
        loop.call_later(fault.begin_s + fault.seconds, server.recover)


def _cut_off(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _now() -> float:
    return asyncio.get_running_loop().time()
