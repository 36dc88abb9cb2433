"""Three ways to send weights to servers: in the request itself, by broadcast, through a shared folder."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_hdpo.rollout.sglang.api import ApiError
from megatron_hdpo.rollout.sglang.replica import Replica
from megatron_hdpo.rollout.sglang.weights.participants import Participants
from megatron_hdpo.rollout.sglang.weights.payload import Bucket, flattened, request_text
from megatron_hdpo.rollout.sglang.weights.update_group import UpdateGroup
from megatron_hdpo.types.disk import give_user_mode
from megatron_hdpo.types.loop_thread import in_daemon_thread

LOGGER = logging.getLogger(__name__)
ABANDON_S = 30.0
"""Longest wait for NCCL to abort a group; it takes a fraction of a second."""
Gather = Callable[[Any], Sequence[Any]]


class TensorTransport:
    """Transport by update_weights_from_tensor.

    On a GPU the request holds handles to the trainer's memory (CUDA IPC), which the server's process on the same GPU
    opens; on a CPU it holds the values. gather: collects a value of the ranks on whose GPUs one server runs, in the
    server's rank order (collective over them); None where this rank's payload serves all ranks of a server.
    """

    def __init__(self, timeout_s: float, gather: Gather | None = None) -> None:
        self.timeout_s, self.gather = timeout_s, gather
        self._servers: Participants | None = None
        self._kept: list[Any] = []

    async def open(self, servers: Participants) -> None:
        """Note the servers, of which some may be lost until a bucket is prepared."""
        self._servers = servers

    def prepare(self, bucket: Bucket) -> Sequence[str]:
        """Return one payload, or one per rank of a server; none when no server takes part any more.

        Memory that handles point to is kept until the next bucket has been gathered; by then the server has read this
        one. Memory whose handle nobody opens is lost: torch keeps it until the other side lets go of it.
        """
        if not self._are_servers_left():
            return []
        tensor, metadata = flattened(bucket)
        payload = request_text(tensor, metadata)
        payloads = [payload] if self.gather is None else self.gather(payload)
        self._kept = [*self._kept[-1:], tensor]
        return payloads

    def _are_servers_left(self) -> bool:
        """Return whether a server takes part that reads this rank's memory."""
        mine = self._servers is not None and bool(self._servers.replicas)
        return mine if self.gather is None else any(self.gather(mine))

    async def send(self, prepared: Sequence[str], servers: Participants, last: dict[str, Any]) -> None:
        """Send the same bucket to every server."""

        async def update(replica: Replica) -> None:
            ranks = replica.info.tensor_parallel
            payloads = list(prepared) if len(prepared) == ranks else [prepared[0]] * ranks
            body = {"serialized_named_tensors": payloads, "load_format": "flattened_bucket", "flush_cache": False}
            await replica.api.update("/update_weights_from_tensor", body | last, self.timeout_s)

        await servers.each(update)

    async def close(self, servers: Participants) -> None:
        """Release the last bucket."""
        self._kept = []

    async def leave(self, replicas: Sequence[Replica]) -> None:
        """Do nothing: there is nothing to leave."""


@dataclass(frozen=True)
class _Sendable:
    """A bucket to broadcast: flattened on the group's device, with the event after which it is complete on a GPU."""

    flat: Tensor
    bucket: Bucket
    ready: torch.cuda.Event | None


class BroadcastTransport:
    """Transport by update_weights_from_distributed.

    This rank broadcasts each bucket to the servers' ranks in a process group of their own (NCCL; gloo on a CPU).
    timeout_s: longest wait for an answer of a server, and then for the end of a broadcast.
    """

    def __init__(self, timeout_s: float, device: torch.device) -> None:
        self.timeout_s, self.device = timeout_s, device
        self._group: UpdateGroup | None = None

    async def open(self, servers: Participants) -> None:
        """Join a process group with all servers that take part; create a new one when they have changed."""
        members = {replica.url: replica.info.tensor_parallel for replica in servers.replicas}
        if self._group is not None and self._group.members == members:
            return
        await self.leave(servers.replicas)
        if not members:
            return
        self._group = UpdateGroup(members, self.device)
        joining = asyncio.create_task(asyncio.to_thread(self._group.join, self.timeout_s))
        offsets = self._group.offsets

        async def join(replica: Replica) -> None:
            body = self._group.invitation(offsets[replica.url])  # type: ignore[union-attr]
            await replica.api.update("/init_weights_update_group", body, self.timeout_s)

        await servers.each(join)
        if len(servers.replicas) < len(members):
            # The group cannot be formed without the servers that failed; try again without them.
            await self._abandon()
            await asyncio.gather(joining, return_exceptions=True)
            await self.open(servers)
            return
        try:
            await joining
        except (RuntimeError, OSError):
            await self._abandon()
            raise

    def prepare(self, bucket: Bucket) -> _Sendable:
        """Return the bucket as one flat tensor on the group's device."""
        flat = flattened(bucket)[0].to(self.device)
        ready = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
        return _Sendable(flat, bucket, ready)

    async def send(self, prepared: _Sendable, servers: Participants, last: dict[str, Any]) -> None:
        """Announce the bucket to every server, broadcast it while they receive, and wait until it has been sent."""
        group, bucket = self._group, prepared.bucket
        if not servers.replicas or group is None:
            return
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": group.name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        sending = in_daemon_thread(lambda: group.broadcast(prepared.flat, prepared.ready))

        async def update(replica: Replica) -> None:
            await replica.api.update("/update_weights_from_distributed", body | last, self.timeout_s)

        before = len(servers.replicas)
        await servers.each(update)
        problem = "another server failed" if len(servers.replicas) < before else await self._problem(sending)
        if problem:
            # When a member is lost during a broadcast, the others hold undefined weights.
            await self._abandon()
            servers.exclude_all(f"a broadcast of weights was interrupted because {problem}")

    async def _problem(self, sending: Future[None]) -> str:
        """Wait for the end of a broadcast; return why it did not arrive, "" when it did."""
        try:
            await asyncio.wait_for(asyncio.wrap_future(sending), self.timeout_s)
        except TimeoutError:
            return f"it did not end within {self.timeout_s:g} s"
        except (RuntimeError, OSError) as error:
            return f"of {type(error).__name__}: {error}"
        return ""

    async def _abandon(self) -> None:
        """Leave the group at once, without its other members."""
        group, self._group = self._group, None
        if group is None:
            return
        try:
            await asyncio.wait_for(asyncio.wrap_future(in_daemon_thread(group.abandon)), ABANDON_S)
        except TimeoutError:
            LOGGER.error("the process group %s was not aborted within %g s; it is left behind", group.name, ABANDON_S)

    async def leave(self, replicas: Sequence[Replica]) -> None:
        """Leave the group, on both sides where the servers answer."""
        if self._group is None:
            return
        for replica in replicas:
            if replica.url in self._group.members:
                try:
                    body = {"group_name": self._group.name}
                    await replica.api.update("/destroy_weights_update_group", body, 30)
                except ApiError:
                    continue  # it was restarted since and has no such group
        await self._abandon()

    async def close(self, servers: Participants) -> None:
        """Do nothing: the group stays for the next update."""


class DiskTransport:
    """Transport by update_weights_from_disk: through a Hugging Face folder that every server's node sees.

    Works everywhere, and costs a write and a read of the whole model.
    """

    def __init__(self, timeout_s: float, folder: Path, model: Path) -> None:
        self.timeout_s, self.folder, self.model = timeout_s, folder, model
        self._files: dict[str, str] = {}
        self._last: dict[str, Any] = {}

    async def open(self, servers: Participants) -> None:
        """Create an empty folder with the model's configuration."""
        self._files = {}
        if not servers.replicas:
            return
        with self._writing():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            for file in self.model.iterdir():
                if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model") and "index" not in file.name:
                    shutil.copy(file, self.folder)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a failure to write into an OSError that names the folder, and delete it: a full disk needs the room."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise OSError(
                f"{self.folder} cannot be written: {error}; make room there, or set rollout.sglang.sync.folder"
            ) from error

    def prepare(self, bucket: Bucket) -> Bucket:
        """Return the tensors in host memory."""
        return [(name, tensor.detach().cpu().contiguous()) for name, tensor in bucket]

    async def send(self, prepared: Bucket, servers: Participants, last: dict[str, Any]) -> None:
        """Write one file per bucket."""
        self._last = last or self._last
        if not servers.replicas:
            return
        file = f"model-{len(set(self._files.values())) + 1:05d}.safetensors"
        with self._writing():
            await asyncio.to_thread(save_file, dict(prepared), self.folder / file, {"format": "pt"})
            give_user_mode(self.folder / file)  # servers may run as another user
        self._files |= {name: file for name, _ in prepared}

    async def close(self, servers: Participants) -> None:
        """Write the index, let the servers read the folder, and delete it."""
        if not servers.replicas:
            return
        with self._writing():
            index = {"metadata": {}, "weight_map": self._files}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        body = {"model_path": str(self.folder.resolve())} | self._last

        async def update(replica: Replica) -> None:
            await replica.api.update("/update_weights_from_disk", body, self.timeout_s)

        await servers.each(update)
        shutil.rmtree(self.folder, ignore_errors=True)

    async def leave(self, replicas: Sequence[Replica]) -> None:
        """Do nothing: there is nothing to leave."""
