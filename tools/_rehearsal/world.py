"""One rank of a world of any size, in one process: stores and host groups that answer with what this rank knows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401, registers the backend `fake`
from torch.distributed import distributed_c10d

from megatron_hdpo.parallel import context as parallel_context
from megatron_hdpo.parallel.layout import ParallelConfig
from megatron_hdpo.parallel.location import RankLocation
from megatron_hdpo.parallel.stop_request import StopRequest

_NCCL_ID_BYTES = 128


class _PromptMeetings:
    """Meetings at which all other ranks have arrived."""

    def __init__(self, *_: Any) -> None:
        self.progress, self.report, self.stop = str, str, StopRequest()

    def meet(self, what: str) -> None:
        """Wait for nobody."""

    def close(self) -> None:
        """Do nothing: no other rank watches this one."""


class OneRankStore(dist.Store):
    """Store that answers every key: what this rank wrote, else the id of an NCCL communicator.

    group_of: name of the process group by the id of its communicator. Keys of ids are `0//<group>//cuda//...`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.group_of: dict[str, str] = {}
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: Any) -> None:
        """Write a value; rank 0 of a group writes the id of its communicator."""
        self._values[key] = value if isinstance(value, bytes) else str(value).encode()
        if "//cuda//" in key:
            self._name(key, self._values[key])

    def get(self, key: str) -> bytes:
        """Return a value; other ranks read the id of a communicator, which is made of the group's name here."""
        if key not in self._values:
            self.set(key, f"group {key}".encode().ljust(_NCCL_ID_BYTES, b"\0"))
        return self._values[key]

    def _name(self, key: str, value: bytes) -> None:
        self.group_of[value.rstrip(b"\0").decode()] = key.split("//")[1]

    def add(self, key: str, amount: int) -> int:
        """Add to a number and return the sum."""
        self.set(key, int(self._values.get(key, b"0")) + amount)
        return int(self._values[key])

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        """Write a value, whatever was there."""
        self.set(key, desired)
        return self._values[key]

    def wait(self, *_: Any) -> None:
        """Return at once: every key is there."""

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys were written: NCCL's watchdog looks for the keys of a failure."""
        return all(key in self._values for key in keys)

    def delete_key(self, key: str) -> bool:
        """Forget a value."""
        return self._values.pop(key, None) is not None

    def set_timeout(self, timeout: timedelta) -> None:
        """Do nothing: nothing waits."""

    def clone(self) -> OneRankStore:
        """Return this store."""
        return self


def _as_on(rank: int, value: Any, gpus_per_node: int) -> Any:
    """Return what another rank would have brought to a gather: this rank's value, but for its location."""
    if isinstance(value, RankLocation):
        local = rank % gpus_per_node
        return RankLocation(rank, local, f"node{rank // gpus_per_node}", value.leads)
    return value


def _nothing(*_: Any, **__: Any) -> None:
    """Return at once: this rank's value stays, and all ranks are there."""


@contextmanager
def one_rank(rank: int, size: int, gpus_per_node: int = 8) -> Iterator[OneRankStore]:
    """Make `megatron_hdpo.parallel.context.start` join a world of `size` ranks in which this process is alone.

    NCCL groups are those of the null GPU. Gloo groups become torch's `fake` ones, and objects that are gathered or
    broadcast are this rank's own.
    """
    store = OneRankStore()  # C++ keeps no reference to its Python half
    init, new_group = dist.init_process_group, dist.new_group

    def join(backend: str | None = None, timeout: timedelta | None = None, **_: Any) -> None:
        init("cpu:fake,cuda:nccl", store=store, rank=rank, world_size=size, timeout=timeout)

    def group(ranks: Any = None, timeout: Any = None, backend: str | None = None, **options: Any) -> Any:
        options.pop("use_local_synchronization", None)
        if backend == "gloo":
            return new_group(ranks, timeout=timeout, backend="fake", group_desc=options.get("group_desc"))
        return new_group(ranks, timeout=timeout, backend=backend, **options)

    def gather(out: list[Any], value: Any, group: Any = None) -> None:
        ranks = dist.get_process_group_ranks(group) if group is not None else range(size)
        out[:] = [_as_on(other, value, gpus_per_node) for other in ranks]

    def replica(layout: ParallelConfig, timeout: timedelta) -> Any:
        inner, replicas = layout.tensor * layout.context, size // layout.model_ranks
        ranks = [other for other in range(size) if other // inner % replicas == rank // inner % replicas]
        return dist.new_group(ranks, backend="gloo", timeout=timeout)

    torchrun = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % gpus_per_node, "LOCAL_WORLD_SIZE": gpus_per_node}
    torchrun |= {"GROUP_RANK": rank // gpus_per_node}
    with (
        patch.dict(os.environ, {key: str(value) for key, value in torchrun.items()}),
        patch.multiple(dist, init_process_group=join, new_group=group, monitored_barrier=_nothing),
        patch.multiple(dist, all_gather_object=gather, broadcast_object_list=_nothing),
        patch.object(distributed_c10d, "new_group", group),
        patch.object(parallel_context, "_replica_group", replica),
        patch.object(parallel_context, "Meetings", _PromptMeetings),
    ):
        yield store
