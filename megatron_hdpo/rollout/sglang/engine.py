"""Engine on SGLang servers: one HTTP request per sample, spread over servers, retried when a server is lost.

An asyncio loop in its own thread talks to the servers; `submit` and `results` are called from other threads.

A failure of a server never becomes a sample: a sample without an answer, with a server error or with an answer that was
cut short is retried, with jitter, on a healthy server. A sample with a valid answer is never retried, so no returned
sample is sampled twice. A server that was lost is restarted (when this process owns it) and samples again from the next
weight update on, because it lost the run's weights.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from megatron_hdpo.rollout.engine import EngineLostWeights
from megatron_hdpo.rollout.request_check import problem_with
from megatron_hdpo.rollout.sglang.answers import UNVERSIONED, BadAnswerError, ExpertChoice, parse_completion
from megatron_hdpo.rollout.sglang.api import ApiError, ServerApi
from megatron_hdpo.rollout.sglang.config import SGLangConfig
from megatron_hdpo.rollout.sglang.loop_thread import LoopThread
from megatron_hdpo.rollout.sglang.replica import Replica
from megatron_hdpo.rollout.sglang.servers.fleet import ServerFleet
from megatron_hdpo.rollout.sglang.shared_gpu import SharedGpu
from megatron_hdpo.rollout.sglang.watch import Watch
from megatron_hdpo.types.rollouts import Completion, GenerationRequest, GenerationResult

LOGGER = logging.getLogger(__name__)
POLL_S = 0.05


class _RetryError(Exception):
    """This try of a sample failed; another try may succeed."""


class SGLangEngine:
    """Engine on the servers of this rank; implements the Engine protocol. A rank that samples nothing has no server.

    urls: all addresses. servers: the processes that this rank started, in the order of the first urls; `close` stops
    them. experts: sizes of the model's experts; without it requests must not ask for routed experts. shared_gpu: the
    GPU that this rank shares with a server, None if the servers have devices of their own. Raises ApiError when a
    server does not answer or is too old, ValueError when its dp_size is not 1.
    """

    def __init__(
        self,
        config: SGLangConfig,
        urls: Sequence[str],
        vocab_size: int,
        context_length: int,
        servers: ServerFleet | None = None,
        experts: ExpertChoice | None = None,
        shared_gpu: SharedGpu | None = None,
    ) -> None:
        self.config, self.vocab_size, self.context_length = config, vocab_size, context_length
        self.experts, self.shared_gpu = experts, shared_gpu
        self.servers = servers
        self.replicas: list[Replica] = []
        self.mixed_versions = 0
        self._version = -1
        self._thread = LoopThread("sglang")
        self._session: aiohttp.ClientSession | None = None
        self._done: queue.SimpleQueue[GenerationResult | None] = queue.SimpleQueue()
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}
        self._outstanding: dict[str, int] = {}
        self._closed = False
        try:
            self._thread.run(self._connect(urls))
        except BaseException:
            self.close()
            raise

    @property
    def deterministic(self) -> bool:
        """Return whether every server was started with deterministic inference."""
        return bool(self.replicas) and all(replica.info.deterministic for replica in self.replicas)

    @property
    def weight_version(self) -> int:
        """Version of the last weights that a server took completely; -1 before the first."""
        return self._version

    @property
    def thread(self) -> LoopThread:
        """Thread of the loop that talks to the servers; weight updates run in it, too."""
        return self._thread

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests, all or none. Raises ValueError on a request that would crash a server or be refused."""
        if len({request.request_id for request in requests}) < len(requests):
            raise ValueError(f"duplicate request ids among {[request.request_id for request in requests][:20]}")
        for request in requests:
            self._validate(request)
        self._outstanding |= {request.request_id: request.sampling.n for request in requests}
        if requests:
            self._thread.run(self._begin(requests))

    def results(self) -> Iterator[GenerationResult | None]:
        """Yield samples one by one as they finish, and None while there is none.

        Raises EngineLostWeights when no server has the run's weights any more: every outstanding request is dropped,
        and a weight update must come first.
        """
        while self._outstanding:
            try:
                result = self._done.get(timeout=POLL_S)
            except queue.Empty:
                yield None
                continue
            if result is None:
                self._drop_outstanding()
                raise EngineLostWeights("; ".join(f"{r.url}: {r.reason}" for r in self.replicas))
            if result.request_id not in self._outstanding:  # dropped by another thread in this moment
                continue
            self._take_off(result)
            yield result

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Cancel the unfinished samples of these requests, also on their servers."""
        self._thread.run(self._cancel(request_ids))

    def make_room(self) -> None:
        """Let servers with a memory saver free weights and key-value cache, until the next weight update.

        Collective over the ranks where they share GPUs with servers.
        """
        if self.shared_gpu is not None and (self.config.servers.memory_saver or self.shared_gpu.trainer is not None):
            self.shared_gpu.receive(lambda: self._thread.run(self._release()))
        elif self.config.servers.memory_saver:
            self._thread.run(self._release())

    async def mark_served(self, served: Sequence[Replica], version: int) -> None:
        """Mark these replicas as serving the weights of `version`, and all other serving replicas as stale.

        Replicas that went down meanwhile stay down.
        """
        for replica in self.replicas:
            if replica in served and replica.state != "down":
                replica.state, replica.reason, replica.half_updated = "serving", "", False
            elif replica.state == "serving":
                replica.state, replica.reason = "stale", f"it missed the weights of version {version}"
        self._version = version

    def close(self) -> None:
        """Cancel requests, close connections and stop the servers that were started. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._outstanding.clear()
        self._thread.run(self._disconnect())
        self._thread.close()
        if self.servers is not None:
            self.servers.close()

    # The coroutines below run in the loop's thread.

    async def _connect(self, urls: Sequence[str]) -> None:
        # No limit on connections: control calls must not wait for samples.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60))
        own = len(self.servers.processes) if self.servers else 0
        for index, url in enumerate(urls):
            self.replicas.append(await self._replica(index, url, index if index < own else None))
            self.context_length = min(self.context_length, self.replicas[-1].info.context or self.context_length)
        self.watch = Watch(self)
        for replica in self.replicas:
            asyncio.get_running_loop().create_task(self.watch.run(replica))

    async def _replica(self, index: int, url: str, own: int | None) -> Replica:
        assert self._session is not None
        variable = self.config.api_key_variable
        key = (
            self.servers.processes[own].api_key if self.servers and own is not None else os.environ.get(variable or "")
        )
        api = ServerApi(self._session, url, key or None)
        ask = ServerApi(self._session, self.config.router, key or None) if self.config.router else api
        info = await api.info()
        if info.data_parallel != 1:
            raise ValueError(f"{url}: dp_size is {info.data_parallel}; weight updates need servers with dp_size 1")
        slots = asyncio.Semaphore(self.config.max_concurrency)
        return Replica(index=index, api=api, ask=ask, info=info, slots=slots, own=own)

    async def _end_tasks(self) -> None:
        """Cancel all running samples and wait for their end."""
        tasks = [task for tasks in self._tasks.values() for task in tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    async def _disconnect(self) -> None:
        await self._end_tasks()
        if self._session is not None:
            await self._session.close()

    async def _release(self) -> int:
        """Let the servers release their memory; return the bytes that one occupied on each of its GPUs.

        A server that is lost from now on is not restarted before the next weight update.
        """
        released = 0
        await self.watch.postpone_restarts()
        for replica in self.replicas:
            if replica.state != "down" and not replica.asleep and replica.info.memory_saver:
                replica.state, replica.reason, replica.asleep = "stale", "its memory is the trainer's", True
                try:
                    async with replica.health_lock:
                        await replica.api.post("/release_memory_occupation", {}, self.config.sync.timeout_s)
                    released = max(released, replica.info.memory)
                except ApiError as error:
                    await self.watch.mark_down(replica, str(error))
        return released

    async def _begin(self, requests: Sequence[GenerationRequest]) -> None:
        loop = asyncio.get_running_loop()
        for request in requests:
            self._tasks[request.request_id] = [
                loop.create_task(self._sample(request, index)) for index in range(request.sampling.n)
            ]

    async def _cancel(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            for task in self._tasks.get(request_id, ()):
                task.cancel()

    async def _sample(self, request: GenerationRequest, index: int) -> None:
        """Sample until there is a completion, a cancellation or a final failure, and queue the result."""
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.config.max_tries),
            wait=wait_random_exponential(multiplier=0.2, max=20),
            retry=retry_if_exception_type(_RetryError),
            reraise=True,
        )
        try:
            completion: Completion = await retrying(self._try, request, index)
            self._done.put(GenerationResult(request.request_id, [completion]))
        except asyncio.CancelledError:
            self._done.put(GenerationResult(request.request_id, [], cancelled=1))
        except EngineLostWeights:
            # Put into the queue, so that `results` raises even if a server is back by then: this sample is lost.
            self._done.put(None)
        except Exception as error:
            LOGGER.warning("request %s, sample %d: %s", request.request_id, index, error)
            self._done.put(GenerationResult(request.request_id, [], errors=[f"sample {index}: {error}"]))

    async def _try(self, request: GenerationRequest, index: int) -> Completion:
        replica, wanted = await self._choose(request), self._version
        async with replica.slots:
            if replica.state != "serving":
                raise _RetryError(f"{replica.url} was lost: {replica.reason}")
            answer = await self._ask(replica, request, index)
        try:
            experts = self.experts if request.sampling.routed_experts else None
            completion = parse_completion(
                answer, request.sampling.top_logprobs, self.vocab_size, experts, len(request.prompt_ids)
            )
        except BadAnswerError as error:
            raise _RetryError(f"{replica.url}: {error}") from error
        if completion.weight_versions.min() == UNVERSIONED:
            raise _RetryError(f"{replica.url}: it was sampled with weights that are not this run's")
        if self.config.router and completion.weight_versions.min() < wanted:
            # A router keeps using servers that missed an update.
            raise _RetryError(f"{replica.url}: a server behind the router has older weights than {wanted}")
        if completion.weight_versions.min() != completion.weight_versions.max():
            self.mixed_versions += 1
            if self.config.mixed_versions == "drop":
                raise _RetryError(f"{replica.url}: it was sampled with weights of two versions")
        return completion

    async def _ask(self, replica: Replica, request: GenerationRequest, index: int) -> dict[str, Any]:
        """Return the server's answer. Raises _RetryError when the server does not answer or is taken out."""
        rid = f"{request.request_id}/{index}-{os.urandom(4).hex()}"
        body = self._body(request, index) | {"rid": rid}
        inner = asyncio.create_task(replica.ask.generate(body, self.config.request_timeout_s))
        replica.in_flight.add(inner)
        try:
            return await inner
        except asyncio.CancelledError:
            current = asyncio.current_task()
            given_up = current is not None and current.cancelling() > 0
            await self._stop_on_server(replica, rid)
            if given_up:
                raise
            raise _RetryError(f"{replica.url} was lost: {replica.reason}") from None
        except ApiError as error:
            if not error.may_pass:
                raise
            await self._stop_on_server(replica, rid)
            if error.status is None:
                await self.watch.probe(replica)
            raise _RetryError(str(error)) from error
        finally:
            replica.in_flight.discard(inner)

    async def _stop_on_server(self, replica: Replica, rid: str) -> None:
        """Abort a sample that is no longer needed on its server; behind a router, on all servers."""
        asked = self.replicas if self.config.router else [replica]
        aborts = [other.api.abort(rid) for other in asked if other.state != "down"]
        with suppress(asyncio.CancelledError):
            await asyncio.shield(asyncio.gather(*aborts, return_exceptions=True))

    async def _choose(self, request: GenerationRequest) -> Replica:
        """Return the serving replica with the least load.

        With similar loads, the same replica for the same affinity, because its cache holds the prompt's prefix. Raises
        EngineLostWeights when no replica serves.
        """
        serving = [replica for replica in self.replicas if replica.state == "serving"]
        if not serving:
            raise EngineLostWeights("no server has the run's weights")
        home = serving[zlib.crc32(request.affinity.encode()) % len(serving)]
        least = min(len(replica.in_flight) for replica in serving)
        if len(home.in_flight) <= max(2 * least, least + 2 * request.sampling.n):
            return home
        return next(replica for replica in serving if len(replica.in_flight) == least)

    def _body(self, request: GenerationRequest, index: int) -> dict[str, Any]:
        settings = request.sampling
        sampling: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": -1 if settings.top_k is None else settings.top_k,
            "stop_token_ids": list(settings.stop_token_ids),
            # Only the stop tokens of the request end a response, as with every other engine.
            "ignore_eos": not settings.stop_token_ids,
        }
        if self.deterministic:
            sampling["sampling_seed"] = (request.seed + index) % 2**31
        return {
            "input_ids": request.prompt_ids.tolist(),
            "sampling_params": sampling,
            "return_logprob": True,
            "top_logprobs_num": settings.top_logprobs,
            "return_flat_raw_output_top_logprobs": bool(settings.top_logprobs),
            "return_flat_raw_top_logprobs_b64": bool(settings.top_logprobs),
        } | ({"return_routed_experts": True} if settings.routed_experts else {})

    # The methods below run in the caller's thread.

    def _validate(self, request: GenerationRequest) -> None:
        problem = problem_with(request, self.vocab_size, self.context_length)
        longest = min((replica.info.max_prompt for replica in self.replicas), default=0)
        if not problem and not self.replicas:
            problem = "this rank has no server"
        if not problem and len(request.prompt_ids) > longest:
            problem = f"a prompt of {len(request.prompt_ids)} tokens; the servers accept at most {longest}"
        if not problem and request.sampling.routed_experts:
            problem = self._problem_with_experts()
        if not problem and self._outstanding.get(request.request_id):
            problem = "this id is already outstanding"
        if problem:
            raise ValueError(f"request {request.request_id}: {problem}")

    def _problem_with_experts(self) -> str:
        if self.experts is None:
            return "routed experts are requested, but the model has no experts"
        silent = [replica.url for replica in self.replicas if not replica.info.routed_experts]
        return f"{silent[0]} was started without --enable-return-routed-experts" if silent else ""

    def _take_off(self, result: GenerationResult) -> None:
        left = self._outstanding[result.request_id] - len(result.completions) - len(result.errors) - result.cancelled
        if left:
            self._outstanding[result.request_id] = left
        else:
            del self._outstanding[result.request_id]
            self._tasks.pop(result.request_id, None)

    def _drop_outstanding(self) -> None:
        self._thread.run(self._end_tasks())
        self._outstanding.clear()
        self._done = queue.SimpleQueue()
