"""Push of the trainer's weights to the servers, bucket by bucket, followed by the gate.

A push is collective over the ranks of each data-parallel replica, because the stream is; servers are independent of
each other. While one bucket is being sent, the next one is gathered. The version is stamped with the last bucket, so
incomplete weights never carry it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from megatron_hdpo.rollout.engine import WeightStream
from megatron_hdpo.rollout.sglang.api import ApiError
from megatron_hdpo.rollout.sglang.engine import SGLangEngine
from megatron_hdpo.rollout.sglang.replica import Replica, reasons
from megatron_hdpo.rollout.sglang.stamps import UNVERSIONED, is_of_a_run
from megatron_hdpo.rollout.sglang.weights.gate import Gate, GateError
from megatron_hdpo.rollout.sglang.weights.participants import Participants
from megatron_hdpo.types.metrics import Metric

LOGGER = logging.getLogger(__name__)
Bucket = list[tuple[str, Tensor]]
T = TypeVar("T")


class WeightPushError(RuntimeError):
    """No server took the weights; the message says of which version, and why."""


class ForeignWeightsError(RuntimeError):
    """Another run sends weights to a server of this run."""


@dataclass(frozen=True)
class PushReport:
    """Bytes of weights that a push sent from this rank (counted once, for any number of servers), and seconds."""

    num_bytes: int
    seconds: float
    servers: int

    def metrics(self) -> dict[str, float]:
        """Return `sync/...` metrics. sync/gb_per_s counts every server's copy; a GB is 1e9 bytes.

        Over ranks, bytes and GB/s are summed; the seconds are those of the slowest rank.
        """
        rate = self.num_bytes * self.servers / 1e9 / max(self.seconds, 1e-9)
        return {
            "sync/bytes": Metric(self.num_bytes, "sum"),
            "sync/transfer_s": Metric(self.seconds, "max"),
            "sync/gb_per_s": Metric(rate, "sum"),
        }


class Transport(Protocol):
    """One way to send buckets to servers.

    `prepare` runs in the caller's thread, where collectives over the trainer's ranks are allowed; the coroutines run in
    the engine's loop.
    """

    async def open(self, servers: Participants) -> None:
        """Prepare for an update, before the first bucket."""

    def prepare(self, bucket: Bucket) -> Any:
        """Return what `send` needs of a bucket. Called on every rank that streams, also without servers."""

    async def send(self, prepared: Any, servers: Participants, last: dict[str, Any]) -> None:
        """Send a bucket. last: fields for the call that completes the weights, {} before it."""

    async def close(self, servers: Participants) -> None:
        """Complete an update, after the last bucket."""

    async def leave(self, replicas: Sequence[Replica]) -> None:
        """Release what was joined: there will be no further push."""


class WeightPush:
    """Pushes weights to all servers of an engine; holds two buckets in addition to what its caller streams.

    gate: None skips the checks. meet: waits for all ranks of the trainer before work that they do together, as a server
    may take long to come back.
    """

    def __init__(
        self,
        engine: SGLangEngine,
        transport: Transport,
        gate: Gate | None,
        meet: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.engine, self.transport, self.gate, self.meet = engine, transport, gate, meet
        self.config = engine.config.sync

    def push(self, stream: WeightStream, version: int) -> PushReport:
        """Send the weights to the servers and stamp them with `version`.

        Servers that fail are taken out. Raises WeightPushError when this rank has servers and none took the weights,
        GateError when a server holds other weights than were sent, ForeignWeightsError when another run has sent it
        weights since the last push; the stream is read to its end before. Raises MemoryShortageError, before the
        stream is read, when a colocated server cannot take its memory back.
        """
        run = self.engine.thread.run
        begin = time.monotonic()
        self._bring_back_lost()
        servers = run(self._participants())
        self.engine.newest_version = version
        try:
            foreign = run(self._exclude_foreign(servers))
            self._give_memory_back()
            run(self._begin(servers))
            self.meet("servers ready for weights")
            num_bytes, gate_input = self._stream(stream, servers, version)
            run(self._complete(servers))
            self._give_memory_back(weights=True)
            run(self._end(servers))
            seconds = time.monotonic() - begin
            if self.gate is not None:
                run(self.gate.check(servers, gate_input, version))
        except BaseException as error:
            run(self._exclude_all(servers, f"its update to version {version} failed: {error}"))
            raise
        finally:
            run(self._continue_generation())
        if foreign:
            raise ForeignWeightsError(foreign)
        self._check_taken(servers, version)
        if self.gate is not None:
            try:
                run(self.gate.probe(servers, version, self.engine.stamp))
            except GateError as error:
                run(self._exclude_all(servers, str(error)))
                raise
            self._check_taken(servers, version)
        run(self.engine.mark_served(servers.replicas, version))
        # A rank without servers only helped to gather.
        return PushReport(num_bytes if servers.replicas else 0, seconds, len(servers.replicas))

    def close(self) -> None:
        """Leave the process groups that were joined for pushing. Idempotent."""
        self.engine.thread.run(self.transport.leave([r for r in self.engine.replicas if r.state != "down"]))

    def _stream(self, stream: WeightStream, servers: Participants, version: int) -> tuple[int, Any]:
        """Send the stream; return the bytes sent and the gate's expectations."""
        expected = self.gate.expect(servers.replicas) if self.gate else None
        sending: Future[None] | None = None
        num_bytes = 0
        try:
            typed = _in_dtype(stream, self._served_dtype())
            for bucket, is_last in _with_last(_buckets(typed, self.config.bucket_mib * 2**20)):
                prepared = self.transport.prepare(bucket)
                num_bytes += sum(_num_bytes(tensor) for _, tensor in bucket)
                if expected is not None:
                    expected.add(bucket)
                if sending is not None:
                    sending.result()
                last = self._last(version) if is_last else {}
                sending = self.engine.thread.start(servers.attempt(self.transport.send(prepared, servers, last)))
        finally:
            # Also when the stream fails: nothing may be in flight when the servers resume generation.
            if sending is not None:
                sending.result()
        return num_bytes, expected

    def _served_dtype(self) -> torch.dtype | None:
        """Return the servers' dtype where all report the same one.

        The weights are converted to it before sending: the servers would round them to it anyway, and the gate compares
        the rounded values.
        """
        names = {replica.info.dtype for replica in self.engine.replicas}
        found = getattr(torch, names.pop(), None) if len(names) == 1 else None
        return found if isinstance(found, torch.dtype) else None

    def _last(self, version: int) -> dict[str, Any]:
        """Return the fields of the last call: the stamp, and whether to flush the prefix cache.

        The cache holds keys of the old weights; it cannot be flushed while running samples use it.
        """
        in_use = self.config.pause == "in_place" and any(replica.in_flight for replica in self.engine.replicas)
        return {"weight_version": self.engine.stamp.of(version), "flush_cache": not in_use}

    async def _participants(self) -> Participants:
        """Return the servers that take part: all that answer, once running restarts have ended."""
        watch = self.engine.watch
        await watch.wait_for_servers()
        watch.paused = True
        return Participants([r for r in self.engine.replicas if r.state != "down"], watch)

    async def _exclude_foreign(self, servers: Participants) -> str:
        """Exclude the servers to which another run has sent weights since this one did; return which, "" for none."""
        found: list[str] = []

        async def look(replica: Replica) -> None:
            stamp = await replica.api.stamp(self.config.timeout_s)
            if self.engine.stamp.version(stamp) != UNVERSIONED:
                return
            if replica.stamped and (is_of_a_run(stamp) or stamp != replica.info.stamp):
                replica.foreign = True
                found.append(f"{replica.url} holds weights stamped {stamp!r}, which this run did not send")
            elif is_of_a_run(stamp):
                LOGGER.warning("%s holds weights of another run, which must not train on it any more", replica.url)

        await servers.each(look)
        for replica in [replica for replica in servers.replicas if replica.foreign]:
            servers.exclude(replica, "another run sends weights to it")
        if not found:
            return ""
        return "; ".join(found) + ": two runs use the same server; give each run servers of its own"

    def _check_taken(self, servers: Participants, version: int) -> None:
        """Raise WeightPushError when this rank has servers, and none of them takes part any more."""
        if self.engine.replicas and not servers.replicas:
            raise WeightPushError(f"no server took the weights of version {version}: {reasons(self.engine.replicas)}")

    async def _exclude_all(self, servers: Participants, reason: str) -> None:
        servers.exclude_all(reason)

    async def _begin(self, servers: Participants) -> None:
        timeout = self.config.timeout_s
        await servers.each(lambda replica: replica.api.pause(self.config.pause, timeout))
        await servers.each(lambda replica: self._resume(replica, "weights"))
        await servers.each(self._begin_session)
        await servers.attempt(self.transport.open(servers))

    async def _begin_session(self, replica: Replica) -> None:
        if not replica.info.sessions:
            return
        try:
            await replica.api.update("/begin_weight_update", {}, self.config.timeout_s)
        except ApiError as error:
            if error.status != 400:
                raise
            # An update that was interrupted has left its session open.
            await replica.api.update("/end_weight_update", {}, self.config.timeout_s)
            await replica.api.update("/begin_weight_update", {}, self.config.timeout_s)

    def _bring_back_lost(self) -> None:
        """Restart servers that were lost while the trainer had their GPU; let weights come home that are away.

        A server that starts takes the memory that it has while it samples, so the trainer makes the same room for it.
        """
        run, watch, shared = self.engine.thread.run, self.engine.watch, self.engine.shared_gpu
        if shared is not None and any(shared.gather(watch.lost)):
            self._give_memory_back(weights=True)
            run(watch.restart_postponed())
            run(watch.wait_for_servers())
            self.engine.make_room()
        elif shared is not None and shared.trainer is not None and shared.trainer.weights_away:
            self.engine.make_room()
        run(watch.restart_postponed())

    def _give_memory_back(self, weights: bool = False) -> None:
        """Return the trainer's memory to GPUs that servers share, before they take theirs. weights: these, too."""
        if self.engine.shared_gpu is not None:
            asleep = any(replica.asleep for replica in self.engine.replicas)
            self.engine.shared_gpu.give_back(asleep, weights)

    async def _complete(self, servers: Participants) -> None:
        """Complete the transfer and the servers' sessions."""
        await servers.attempt(self.transport.close(servers))
        with_session = [replica for replica in servers.replicas if replica.info.sessions]

        async def end(replica: Replica) -> None:
            if replica in with_session:
                await replica.api.update("/end_weight_update", {}, self.config.timeout_s)

        await servers.each(end)
        for replica in servers.replicas:
            replica.stamped = True

    async def _end(self, servers: Participants) -> None:
        await servers.each(lambda replica: self._resume(replica, "kv_cache", "cuda_graph"))
        for replica in servers.replicas:
            replica.asleep = False

    async def _resume(self, replica: Replica, *tags: str) -> None:
        """Take back memory that was released to the trainer.

        That of the weights is taken back before the update, the rest afterwards.
        """
        if replica.asleep:
            await replica.api.post("/resume_memory_occupation", {"tags": list(tags)}, self.config.timeout_s)

    async def _continue_generation(self) -> None:
        """Resume generation on every server, also after a failed update: a server left paused would never recover."""

        async def resume(replica: Replica) -> None:
            try:
                await replica.api.continue_generation(10)
            except ApiError as error:
                replica.reason = replica.reason or str(error)

        paused = [r for r in self.engine.replicas if not r.foreign and (r.state != "down" or r.own is None)]
        await asyncio.gather(*map(resume, paused))
        self.engine.watch.paused = False


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _in_dtype(stream: WeightStream, dtype: torch.dtype | None) -> WeightStream:
    return stream if dtype is None else ((name, tensor.to(dtype)) for name, tensor in stream)


def _buckets(stream: WeightStream, limit: int) -> Iterator[Bucket]:
    """Yield lists of consecutive tensors of at most `limit` bytes together, or a single larger tensor."""
    bucket: Bucket = []
    size = 0
    for name, tensor in stream:
        if bucket and size + _num_bytes(tensor) > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += _num_bytes(tensor)
    if bucket:
        yield bucket


def _with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield each item, and whether it is the last one."""
    iterator = iter(items)
    for item in iterator:
        held = item
        for following in iterator:
            yield held, False
            held = following
        yield held, True
