"""Three ways to send weights to servers: in the request itself, by broadcast, through a shared folder."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_hdpo.rollout.sglang.api import ApiError
from megatron_hdpo.rollout.sglang.replica import Replica
from megatron_hdpo.rollout.sglang.weights.participants import Participants
from megatron_hdpo.rollout.sglang.weights.payload import Bucket, flattened, request_text
from megatron_hdpo.rollout.sglang.weights.update_group import UpdateGroup

GatherPayloads = Callable[[str], Sequence[str]]


class TensorTransport:
    """Transport by update_weights_from_tensor.

    On a GPU the request holds handles to the trainer's memory (CUDA IPC), which the server's process on the same GPU
    opens; on a CPU it holds the values. gather: collects the payloads of the ranks on whose GPUs one server runs, in
    the server's rank order (collective over them); None where this rank's payload serves all ranks of a server.
    """

    def __init__(self, timeout_s: float, gather: GatherPayloads | None = None) -> None:
        self.timeout_s, self.gather = timeout_s, gather
        self._kept: list[Any] = []

    async def open(self, servers: Participants) -> None:
        """Do nothing: no preparation is needed."""

    def prepare(self, bucket: Bucket) -> Sequence[str]:
        """Return one payload, or one per rank of a server.

        Memory that handles point to is kept until the next bucket has been gathered; by then the server has read this
        one.
        """
        tensor, metadata = flattened(bucket)
        payload = request_text(tensor, metadata)
        payloads = [payload] if self.gather is None else self.gather(payload)
        self._kept = [*self._kept[-1:], tensor]
        return payloads

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


class BroadcastTransport:
    """Transport by update_weights_from_distributed.

    This rank broadcasts each bucket to the servers' ranks in a process group of their own (NCCL; gloo on a CPU).
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
        self._group = UpdateGroup(members, "nccl" if self.device.type == "cuda" else "gloo")
        joining = asyncio.create_task(asyncio.to_thread(self._group.join, self.timeout_s))
        offsets = self._group.offsets

        async def join(replica: Replica) -> None:
            body = self._group.invitation(offsets[replica.url])  # type: ignore[union-attr]
            await replica.api.update("/init_weights_update_group", body, self.timeout_s)

        await servers.each(join)
        if len(servers.replicas) < len(members):
            # The group cannot be formed without the servers that failed; try again without them.
            self._group.abandon()
            self._group = None
            await asyncio.gather(joining, return_exceptions=True)
            await self.open(servers)
            return
        await joining

    def prepare(self, bucket: Bucket) -> tuple[Tensor, Bucket]:
        """Return the bucket as one flat tensor on the group's device, and the bucket."""
        return flattened(bucket)[0].to(self.device), bucket

    async def send(self, prepared: tuple[Tensor, Bucket], servers: Participants, last: dict[str, Any]) -> None:
        """Announce the bucket to every server, and broadcast it while they receive."""
        flat, bucket = prepared
        if not servers.replicas or self._group is None:
            return
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": self._group.name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        sending = asyncio.create_task(asyncio.to_thread(self._group.broadcast, flat))

        async def update(replica: Replica) -> None:
            await replica.api.update("/update_weights_from_distributed", body | last, self.timeout_s)

        before = len(servers.replicas)
        await servers.each(update)
        if len(servers.replicas) < before:
            await self._give_up(servers)
        await asyncio.gather(sending, return_exceptions=len(servers.replicas) < before)

    async def _give_up(self, servers: Participants) -> None:
        """Exclude all servers: when a member dies during a broadcast, the others hold undefined weights."""
        if self._group is not None:
            self._group.abandon()
            self._group = None
        servers.exclude_all("a broadcast of weights was interrupted because another server failed")

    async def leave(self, replicas: Sequence[Replica]) -> None:
        """Destroy the group, on both sides where the servers answer."""
        if self._group is None:
            return
        group, self._group = self._group, None
        for replica in replicas:
            if replica.url in group.members:
                try:
                    await replica.api.update("/destroy_weights_update_group", {"group_name": group.name}, 30)
                except ApiError:
                    continue  # it was restarted since and has no such group
        group.abandon()

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
        if servers.replicas:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            for file in self.model.iterdir():
                if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model") and "index" not in file.name:
                    shutil.copy(file, self.folder)

    def prepare(self, bucket: Bucket) -> Bucket:
        """Return the tensors in host memory."""
        return [(name, tensor.detach().cpu().contiguous()) for name, tensor in bucket]

    async def send(self, prepared: Bucket, servers: Participants, last: dict[str, Any]) -> None:
        """Write one file per bucket."""
        self._last = last or self._last
        if not servers.replicas:
            return
        file = f"model-{len(set(self._files.values())) + 1:05d}.safetensors"
        await asyncio.to_thread(save_file, dict(prepared), self.folder / file, {"format": "pt"})
        self._files |= {name: file for name, _ in prepared}

    async def close(self, servers: Participants) -> None:
        """Write the index, let the servers read the folder, and delete it."""
        if not servers.replicas:
            return
        index = {"metadata": {}, "weight_map": self._files}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        body = {"model_path": str(self.folder.resolve())} | self._last

        async def update(replica: Replica) -> None:
            await replica.api.update("/update_weights_from_disk", body, self.timeout_s)

        await servers.each(update)
        shutil.rmtree(self.folder, ignore_errors=True)

    async def leave(self, replicas: Sequence[Replica]) -> None:
        """Do nothing: there is nothing to leave."""
