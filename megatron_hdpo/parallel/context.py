"""The process groups of a run, its device, and host-side exchange of Python objects."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hdpo.parallel.cpu import MegatronOnCpu
from megatron_hdpo.parallel.heartbeat import End, Heartbeat, go_on
from megatron_hdpo.parallel.joining import joining
from megatron_hdpo.parallel.late import Patience
from megatron_hdpo.parallel.layout import LayoutError, ParallelConfig, check_ranks
from megatron_hdpo.parallel.meetings import Meetings
from megatron_hdpo.parallel.router_name import router_name_defined

T = TypeVar("T")
LEAST_PATIENCE_S = 60.0
"""A process is not given up earlier: on a busy machine a thread may get no time for seconds."""


@dataclass(frozen=True)
class ParallelContext:
    """The ranks of a run, their groups and this rank's device; passed as an argument, never read from global state.

    groups: Megatron's process groups (tp, cp, pp, dp, ep, embd, ...).
    host: gloo group of all ranks, for Python objects. replica_host: gloo group of the ranks of one replica, ordered by
    pipeline stage, then context-parallel rank, then tensor-parallel rank. meetings: where ranks wait for
    each other outside of collectives.
    """

    layout: ParallelConfig
    device: torch.device
    rank: int
    world_size: int
    groups: ProcessGroupCollection
    host: dist.ProcessGroup
    replica_host: dist.ProcessGroup
    meetings: Meetings

    @property
    def heartbeat(self) -> Heartbeat:
        """Return the heartbeat, which tells other ranks what this one does, and learns what they do."""
        return self.meetings.heartbeat

    @property
    def dp_rank(self) -> int:
        """Index of this rank's data-parallel replica."""
        return self.groups.dp.rank()

    @property
    def dp_size(self) -> int:
        """Number of data-parallel replicas."""
        return self.groups.dp.size()

    @property
    def is_leader(self) -> bool:
        """True on the one rank that writes files and the console."""
        return self.rank == 0

    @property
    def is_replica_leader(self) -> bool:
        """True on the one rank of each data-parallel replica that adds the replica's numbers to sums over all ranks."""
        return self.rank == self.replica_ranks[0]

    @property
    def is_first_stage(self) -> bool:
        """True on the pipeline stage that holds the embedding."""
        return self.groups.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """True on the pipeline stage that holds the head and computes the logits."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    @property
    def replica_ranks(self) -> list[int]:
        """Global ranks of this replica, in the order of `replica_host`."""
        return dist.get_process_group_ranks(self.replica_host)

    def megatron_calls(self) -> AbstractContextManager[Any]:
        """Return the context in which Megatron-Core runs on this device."""
        return router_name_defined() if self.device.type == "cuda" else MegatronOnCpu()

    def gather_objects(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Gather `value` from every rank of a host group (default: all ranks), in rank order, to every rank."""
        group = group or self.host
        gathered: list[Any] = [None] * group.size()
        dist.all_gather_object(gathered, value, group=group)
        return gathered

    def broadcast_object(self, value: T, group: dist.ProcessGroup | None = None, source: int = 0) -> T:
        """Return the value of the group's rank `source` on every rank of the host group (default: all ranks)."""
        group = group or self.host
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_process_group_ranks(group)[source], group=group)
        return box[0]

    def barrier(self, what: str) -> None:
        """Wait for all ranks, outside of collectives: the work before it, `what`, may take hours while it progresses.

        Call it before a collective that ranks may reach at very different times. Raises RankError when a rank has ended
        or shows no progress (`meetings.py`).
        """
        self.meetings.meet(what)


def start(layout: ParallelConfig, device: str = "auto", seed: int = 0, end: End = go_on) -> ParallelContext:
    """Join the process group that torchrun describes (or a world of one) and build Megatron's groups.

    device: `cuda`, `cpu` or `auto` (cuda if there is a GPU). The backend is NCCL on CUDA and gloo on the CPU. end: gets
    a line on ranks that keep the others waiting, and ends this process (`Heartbeat`).
    Raises LayoutError when the number of ranks does not fit the layout, before any group is made; RankError when the
    store of the job cannot be reached.
    """
    target = _device(device)
    check_ranks(layout, int(os.environ.get("WORLD_SIZE", "1")))
    patience = patience_of(layout)
    with joining(patience, end):
        context = _start(layout, target, patience, end)
    _seed(context, seed)
    return context


def patience_of(layout: ParallelConfig) -> Patience:
    """Return for how long ranks wait for each other."""
    collective_s = 60 * layout.timeout_minutes
    return Patience(
        work_s=60 * layout.silence_minutes,
        process_s=max(LEAST_PATIENCE_S, collective_s),
        collective_s=collective_s,
        phases={phase: 60 * minutes for phase, minutes in layout.phase_minutes.items()},
    )


def _start(layout: ParallelConfig, target: torch.device, patience: Patience, end: End) -> ParallelContext:
    # Heartbeats end a run whose ranks wait in vain, and name the late one; a collective's own deadline only has to be
    # later: it does not know whether the rank that others wait for makes progress.
    timeout = timedelta(seconds=patience.last_resort_s)
    if not dist.is_initialized():
        backend = "nccl" if target.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:  # started without torchrun: a single process needs no port
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_stages if layout.virtual_stages > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
        create_gloo_process_groups=True,
    )
    host = dist.new_group(backend="gloo", timeout=timeout)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    replica_host = _replica_group(layout, timeout)
    counted = [host, replica_host, groups.dp, groups.tp, groups.pp, groups.cp, groups.ep]
    store = dist.distributed_c10d._get_default_store()
    return ParallelContext(
        layout=layout,
        device=target,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        groups=groups,
        host=host,
        replica_host=replica_host,
        meetings=Meetings(store, host, patience, counted, end),
    )


def stop(context: ParallelContext | None = None) -> None:
    """Tear down Megatron's groups and the process group.

    context: that of this rank, whose end the other ranks then take for what it is.
    """
    if context is not None:
        context.meetings.close()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise LayoutError("device=cuda, but torch sees no GPU on this machine: set device=cpu or device=auto")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def _replica_group(layout: ParallelConfig, timeout: timedelta) -> dist.ProcessGroup:
    """Return a gloo group of this rank's replica: its tensor-, context- and pipeline-parallel ranks.

    `new_group` is collective, so every rank makes the groups of all replicas, in the same order.
    """
    replicas = dist.get_world_size() // layout.model_ranks
    mine, everyone = parallel_state.get_data_parallel_rank(), [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    own = None
    for replica in range(replicas):
        ranks = [rank for rank, index in enumerate(everyone) if index == replica]
        group = dist.new_group(ranks, backend="gloo", timeout=timeout)
        own = group if replica == mine else own
    assert own is not None
    return own


def _seed(context: ParallelContext, seed: int) -> None:
    torch.manual_seed(seed)
    with context.megatron_calls():
        # This tracker needs no CUDA generator; it suffices because dropout is 0 in every model here.
        tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
