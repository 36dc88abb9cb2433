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
from collections.abc import Iterator, Mapping, Sequence

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from megatron_hdpo.rollout.engine import EngineLostWeights
from megatron_hdpo.rollout.request_check import problem_with, problem_with_room
from megatron_hdpo.rollout.sglang.answers import ExpertChoice
from megatron_hdpo.rollout.sglang.api import ApiError, ServerApi
from megatron_hdpo.rollout.sglang.asking import Asking, OpenSample, TryError
from megatron_hdpo.rollout.sglang.beginnings import Beginnings
from megatron_hdpo.rollout.sglang.config import SGLangConfig
from megatron_hdpo.rollout.sglang.counts import Counts
from megatron_hdpo.rollout.sglang.dispatcher import Dispatcher, ServersFail
from megatron_hdpo.rollout.sglang.parsers import Parsers
from megatron_hdpo.rollout.sglang.replica import Replica, first_few, reasons
from megatron_hdpo.rollout.sglang.servers.fleet import ServerFleet
from megatron_hdpo.rollout.sglang.shared_gpu import SharedGpu
from megatron_hdpo.rollout.sglang.sockets import room_for
from megatron_hdpo.rollout.sglang.stamps import RunStamp
from megatron_hdpo.rollout.sglang.usage import Usage
from megatron_hdpo.rollout.sglang.watch import Watch
from megatron_hdpo.types.loop_thread import LoopThread
from megatron_hdpo.types.metrics import Metric
from megatron_hdpo.types.rollouts import Completion, GenerationRequest, GenerationResult

LOGGER = logging.getLogger(__name__)
POLL_S = 0.05
KEEP_ALIVE_S = 2.0
"""Seconds that an idle connection is kept, fewer than SGLang's 5: a server may close it while a request is sent."""


class SGLangEngine:
    """Engine on the servers of this rank; implements the Engine protocol. A rank that samples nothing has no server.

    urls: all addresses. servers: the processes that this rank started, in the order of the first urls; `close` stops
    them. experts: sizes of the model's experts; without it requests must not ask for routed experts. shared_gpu: the
    GPU that this rank shares with a server, None if the servers have devices of their own. stamp: of this run, the same
    on all ranks. lengths: tokens of the longest sequences that will be requested, each by the words for its settings.
    Raises ApiError when a server does not answer or is too old, ValueError when it was started with an argument that
    spoils the run, or when it would cut a sequence short.
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
        stamp: RunStamp | None = None,
        lengths: Mapping[str, int] | None = None,
    ) -> None:
        self.config, self.vocab_size, self.context_length = config, vocab_size, context_length
        self.experts, self.shared_gpu = experts, shared_gpu
        self.servers = servers
        self.stamp, self.lengths = stamp or RunStamp(), lengths or {}
        self.newest_version = -1
        """Version of the weights that were sent last, or are being sent."""
        self.replicas: list[Replica] = []
        self.dropping = False
        """All samples are being cancelled, to be requested anew; what they have so far is kept."""
        self.parsers = Parsers(config.parser_processes)
        self.mixed_versions = 0
        self.counts, self.usage = Counts(), Usage()
        self._restarts_told = 0
        self._version = -1
        self._thread = LoopThread("sglang")
        self._session: aiohttp.ClientSession | None = None
        self._done: queue.SimpleQueue[GenerationResult | EngineLostWeights | ServersFail] = queue.SimpleQueue()
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
    def slots(self) -> int:
        """Most samples in flight on the servers that have the run's weights."""
        return self.config.max_concurrency * sum(replica.state == "serving" for replica in self.replicas)

    @property
    def weight_version(self) -> int:
        """Version of the last weights that a server took completely; -1 before the first."""
        return self._version

    @property
    def max_sequence(self) -> int:
        """Most tokens of prompt and response together that every server samples to the end."""
        return min((replica.info.max_sequence for replica in self.replicas), default=2**31)

    @property
    def thread(self) -> LoopThread:
        """Thread of the loop that talks to the servers; weight updates run in it, too."""
        return self._thread

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests, all or none. Raises ValueError on a request that would crash a server or be refused."""
        if len({request.request_id for request in requests}) < len(requests):
            raise ValueError(f"duplicate request ids among {[request.request_id for request in requests][:20]}")
        longest_prompt = min((replica.info.max_prompt for replica in self.replicas), default=0)
        longest = self.max_sequence
        for request in requests:
            self._validate(request, longest_prompt, longest)
        self._outstanding |= {request.request_id: request.sampling.n for request in requests}
        if requests:
            self._thread.run(self._begin(requests))

    def results(self) -> Iterator[GenerationResult | None]:
        """Yield samples one by one as they finish, and None while there is none.

        Raises EngineLostWeights when no server has the run's weights any more: every outstanding request is dropped,
        and a weight update must come first. Raises ServersFail when every server has failed all of its samples for
        `request_timeout_s`.
        """
        while self._outstanding:
            try:
                result = self._done.get(timeout=POLL_S)
            except queue.Empty:
                yield None
                continue
            if isinstance(result, EngineLostWeights):
                self._drop_outstanding()
                raise EngineLostWeights(reasons(self.replicas))
            if isinstance(result, ServersFail):
                self._drop_outstanding()
                raise result
            if result.request_id not in self._outstanding:  # dropped by another thread in this moment
                continue
            self._take_off(result)
            yield result

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Cancel the unfinished samples of these requests, also on their servers."""
        self._thread.run(self._cancel(request_ids))

    def metrics(self) -> dict[str, float]:
        """Return counts and use of samples and servers since the last call, and the numbers of servers."""
        return self._thread.run(self._metrics())

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
        self.usage.sleep(False)
        if version != self._version:
            self.counts.lost_tokens += self._beginnings.clear()
        self._version = self.newest_version = version

    def close(self) -> None:
        """Cancel requests, close connections and stop the servers that were started. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._outstanding.clear()
        self.parsers.close()
        self._thread.run(self._disconnect())
        self._thread.close()
        if self.servers is not None:
            self.servers.close()

    # The coroutines below run in the loop's thread.

    async def _connect(self, urls: Sequence[str]) -> None:
        # No limit on connections: control calls must not wait for samples.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        self._session = aiohttp.ClientSession(connector=connector)
        own = len(self.servers.processes) if self.servers else 0
        asked = (self._replica(index, url, index if index < own else None) for index, url in enumerate(urls))
        self.replicas += await asyncio.gather(*asked)
        if self.config.stream_interval:
            self._say_what_cannot_stream()
        self.watch = Watch(self)
        self._asking = Asking(self)
        self._beginnings = Beginnings(seeded=self.deterministic)
        self._dispatcher = Dispatcher(
            self.replicas, self._slots(len(urls)), self.config.request_timeout_s, self.watch.trial
        )
        loop = asyncio.get_running_loop()
        self._background = [loop.create_task(self._dispatcher.run())]
        self._background.append(loop.create_task(self.watch.clock.run()))
        self._background += [loop.create_task(self.watch.run(replica)) for replica in self.replicas]

    def _slots(self, servers: int) -> int:
        """Return the samples in flight per server: `max_concurrency`, or as many as this process may open files for."""
        wanted = self.config.max_concurrency
        room = room_for(servers * wanted)
        if room >= servers * wanted:
            return wanted
        slots = max(1, room // servers)
        LOGGER.warning(
            "rollout.sglang.max_concurrency: %d samples on each of %d servers need more open files than this process "
            "may have; %d are in flight on each: raise the limit (ulimit -n)",
            wanted,
            servers,
            slots,
        )
        return slots

    def _say_what_cannot_stream(self) -> None:
        if silent := [replica.url for replica in self.replicas if not replica.info.streams_increments]:
            LOGGER.warning(
                "SGLang servers %s were started without --incremental-streaming-output: the tokens of their unfinished "
                "samples are lost with them",
                first_few(silent),
            )

    async def _replica(self, index: int, url: str, own: int | None) -> Replica:
        assert self._session is not None
        variable = self.config.api_key_variable
        key = (
            self.servers.processes[own].api_key if self.servers and own is not None else os.environ.get(variable or "")
        )
        api = ServerApi(self._session, url, key or None)
        ask = ServerApi(self._session, self.config.router, key or None) if self.config.router else api
        info = await api.info()
        if problem := info.problem_with(self.lengths):
            raise ValueError(f"{url}: {problem}")
        return Replica(index=index, api=api, ask=ask, info=info, own=own)

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

    async def _metrics(self) -> dict[str, float]:
        in_use = sum(r.state == "serving" and r.breaker.state == "closed" for r in self.replicas)
        restarts = sum(self.servers.restarts) if self.servers else 0
        numbers = {
            "servers/all": Metric(len(self.replicas), "sum"),
            "servers/in_use": Metric(in_use, "sum"),
            "servers/restarts": Metric(restarts - self._restarts_told, "sum"),
        }
        self._restarts_told = restarts
        return numbers | self.counts.take() | self.usage.take()

    async def _release(self) -> int:
        """Let the servers release their memory; return the bytes that one occupied on each of its GPUs.

        A server that is lost from now on is not restarted before the next weight update.
        """
        released = 0
        await self.watch.postpone_restarts()
        for replica in self.replicas:
            if replica.state != "down" and not replica.asleep and replica.info.memory_saver:
                replica.state, replica.reason, replica.asleep = "stale", "its memory is the trainer's", True
                self.usage.sleep(True)
                try:
                    async with replica.health_lock:
                        await replica.api.post("/release_memory_occupation", {}, self.config.sync.timeout_s)
                    released = max(released, replica.info.memory)
                except ApiError as error:
                    await self.watch.mark_down(replica, str(error))
        return released

    async def _begin(self, requests: Sequence[GenerationRequest]) -> None:
        loop = asyncio.get_running_loop()
        self._dispatcher.refresh()
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
            retry=retry_if_exception_type(TryError),
            reraise=True,
        )
        sample = OpenSample(request, index, self._beginnings.take(request, index))
        self.usage.sample(1)
        try:
            completion: Completion = await retrying(self._try, sample)
            self._done.put(GenerationResult(request.request_id, [completion]))
        except asyncio.CancelledError:
            if self.dropping:
                self._hold(sample)
            self._done.put(GenerationResult(request.request_id, [], cancelled=1))
        except (EngineLostWeights, ServersFail) as error:
            # Put into the queue, so that `results` raises even if a server is back by then: this request is over.
            self._hold(sample)
            self._done.put(error)
        except Exception as error:
            LOGGER.warning("request %s, sample %d: %s", request.request_id, index, error)
            self._done.put(GenerationResult(request.request_id, [], errors=[f"sample {index}: {error}"]))
        finally:
            self.usage.sample(-1)

    def _hold(self, sample: OpenSample) -> None:
        """Hold what a sample has so far until it is requested again, after the weights have been restored."""
        if sample.beginning is not None:
            self._beginnings.put(sample.request, sample.index, sample.beginning)

    async def _try(self, sample: OpenSample) -> Completion:
        """Return the completed sample.

        Raises TryError when a server failed it. When the server was lost, or has at least generated some tokens, the
        sample goes on elsewhere without that.
        """
        request = sample.request
        while True:
            before = sample.tokens
            async with self._dispatcher.slot(request.affinity, request.sampling.n, sample.failed) as replica:
                try:
                    completion = await self._asking.ask(replica, sample)
                except TryError as error:
                    self.counts.failed_tries += 1
                    progressed = sample.tokens > before
                    if error.blame == "server" and not self.config.router:
                        self._blame(replica, sample, str(error), counts=not progressed)
                    if not progressed and error.blame is not None:
                        raise
                else:
                    if replica.breaker.succeed():
                        LOGGER.warning("SGLang server %s is well again", replica.url)
                    return completion

    def _blame(self, replica: Replica, sample: OpenSample, reason: str, counts: bool) -> None:
        """Let the sample avoid a server that failed it; take the server out of rotation if it fails one after another.

        counts: the server has generated nothing.
        """
        sample.failed.add(replica.index)
        if counts and replica.breaker.fail(sample.key, reason):
            self.counts.tripped += 1
            LOGGER.warning(
                "SGLang server %s gets no samples for a while, because it fails them: %s", replica.url, reason
            )

    # The methods below run in the caller's thread.

    def _validate(self, request: GenerationRequest, longest_prompt: int, longest: int) -> None:
        problem = problem_with(request, self.vocab_size, self.context_length)
        if not problem and not self.replicas:
            problem = "this rank has no server"
        if not problem:
            problem = problem_with_room(request, longest_prompt, longest)
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
        if not silent:
            return ""
        return f"{silent[0]} was started without --enable-return-routed-experts, or with speculative decoding"

    def _take_off(self, result: GenerationResult) -> None:
        left = self._outstanding[result.request_id] - len(result.completions) - len(result.errors) - result.cancelled
        if left:
            self._outstanding[result.request_id] = left
        else:
            del self._outstanding[result.request_id]
            self._tasks.pop(result.request_id, None)

    def _drop_outstanding(self) -> None:
        self.dropping = True
        self._thread.run(self._end_tasks())
        self.dropping = False
        self._outstanding.clear()
        self._done = queue.SimpleQueue()
