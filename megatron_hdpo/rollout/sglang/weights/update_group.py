"""Process group in which the trainer, rank 0, broadcasts weights to the servers' ranks.

A server may die at any moment, so nothing here waits for the other members but the thread that broadcasts. With NCCL a
broadcast to a member that died never ends: it runs on a stream of its own, behind which no other work of the trainer
waits, its end is polled, and the group is aborted, which ends the stuck kernel.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_hdpo.parallel.variables import variable_set
from megatron_hdpo.rollout.sglang.servers.ports import HeldPort, node_address

POLL_S = 0.002
NCCL_PATIENCE = 4
"""Timeout of the NCCL group in multiples of the time that an answer or a broadcast may take. torch may end the process
when the timeout of a group passes, so whoever waits for a broadcast must have given up long before."""
_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


class UpdateGroup:
    """Process group of the trainer (rank 0) and the servers: NCCL for tensors on a GPU, else gloo.

    members: number of ranks of each server, by its address; their ranks follow the trainer's in this order. device: of
    the tensors that are broadcast.
    """

    def __init__(self, members: Mapping[str, int], device: torch.device) -> None:
        self.members, self.device = dict(members), device
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self.host = "127.0.0.1" if all(map(_is_on_this_node, members)) else node_address()
        self.name = f"weights-{secrets.token_hex(4)}"
        self.world_size = 1 + sum(members.values())
        self.offsets: dict[str, int] = {}
        offset = 1
        for url, ranks in members.items():
            self.offsets[url] = offset
            offset += ranks
        self._port = HeldPort(self.host)
        self._group: dist.ProcessGroup | None = None
        self._store: dist.Store | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._abandoned = threading.Event()

    def invitation(self, offset: int) -> dict[str, Any]:
        """Return the body of /init_weights_update_group for the server with first rank `offset`."""
        return {
            "master_address": self.host,
            "master_port": self._port.number,
            "rank_offset": offset,
            "world_size": self.world_size,
            "group_name": self.name,
            "backend": self.backend,
        }

    def join(self, timeout_s: float) -> None:
        """Create the group and wait for all members; blocks."""
        timeout = timedelta(seconds=timeout_s)
        store = dist.TCPStore(self.host, self._port.number, self.world_size, True, timeout, wait_for_workers=False)
        self._store = dist.PrefixStore(self.name, store)
        # torch has no public function for a second world; SGLang's side uses this private one too.
        name = distributed_c10d.GroupName(self.name)
        if self.backend == "nccl":
            timeout *= NCCL_PATIENCE
        with _errors_do_not_end_the_process():
            self._group, _ = distributed_c10d._new_process_group_helper(
                self.world_size, 0, [], dist.Backend(self.backend), self._store, group_name=name, timeout=timeout
            )
        distributed_c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(self.world_size)}

    def broadcast(self, flat: Tensor, ready: torch.cuda.Event | None) -> None:
        """Send a tensor to all members and wait until it has been sent; blocks.

        ready: event after which the tensor holds its values, on a GPU. Raises RuntimeError when the group is abandoned
        meanwhile. The tensor's memory is in use until this returns or raises.
        """
        group = self._group
        assert group is not None
        if self._stream is None:
            dist.broadcast(flat, 0, group=group)
            return
        with torch.cuda.stream(self._stream):
            if ready is not None:
                self._stream.wait_event(ready)
            dist.broadcast(flat, 0, group=group)
            sent = self._stream.record_event()
        while not sent.query():
            if self._abandoned.wait(POLL_S):
                raise RuntimeError(f"the group {self.name} was abandoned during a broadcast")

    def abandon(self) -> None:
        """Leave the group without waiting for the other members, also during a broadcast. Idempotent."""
        group, self._group, self._store = self._group, None, None
        if group is not None and self.device.type == "cuda":
            # To destroy it would be to wait for its outstanding operations.
            distributed_c10d._abort_process_group(group)
        elif group is not None:
            dist.destroy_process_group(group)
        self._abandoned.set()
        self._port.close()


def _errors_do_not_end_the_process() -> AbstractContextManager[None]:
    """Let NCCL groups that are created in this context leave a lost member and a timeout to their user.

    By default a thread of torch's ends the process when a member of a group is lost. torch reads this variable at the
    creation of each group.
    """
    return variable_set(_ERROR_HANDLING, "0")


def _is_on_this_node(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
