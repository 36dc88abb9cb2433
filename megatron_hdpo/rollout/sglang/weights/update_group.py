"""Process group in which the trainer, rank 0, broadcasts weights to the servers' ranks."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_hdpo.rollout.sglang.servers.ports import HeldPort, node_address


class UpdateGroup:
    """Process group of the trainer (rank 0) and the servers.

    members: number of ranks of each server, by its address; their ranks follow the trainer's in this order.
    """

    def __init__(self, members: Mapping[str, int], backend: str) -> None:
        self.members, self.backend = dict(members), backend
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
        self._group, _ = distributed_c10d._new_process_group_helper(
            self.world_size, 0, [], dist.Backend(self.backend), self._store, group_name=name, timeout=timeout
        )
        distributed_c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(self.world_size)}

    def broadcast(self, flat: Tensor) -> None:
        """Send a tensor to all members; blocks."""
        assert self._group is not None
        dist.broadcast(flat, 0, group=self._group)

    def abandon(self) -> None:
        """Destroy this side of the group without waiting for the other members."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._group = self._store = None
        self._port.close()


def _is_on_this_node(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
