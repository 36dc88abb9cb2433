"""Data-parallel communication beside computation: gradients are reduced bucket by bucket while the backward pass still
runs, and an update's new weights are gathered bucket by bucket while the forward pass of the next one runs.

The second is where silent errors live: after an optimizer step a rank holds the new values of its own part alone, until
a forward pass through Megatron's DDP has gathered the others. Whoever reads weights otherwise (an engine's sync, a
checkpoint, a teacher's copy) would read old ones. So `gather_weights` completes them, and an update ends with it unless
its caller says that another update follows at once.
"""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import nn

from megatron_hdpo.model.chunks import chunks_of
from megatron_hdpo.parallel.context import ParallelContext


def overlaps(context: ParallelContext) -> bool:
    """Whether this run overlaps: as parallel.overlap says; by default on GPUs with several replicas. On a CPU gloo's
    threads would take the cores that compute."""
    wanted = context.layout.overlap
    return wanted if isinstance(wanted, bool) else context.device.type == "cuda" and context.groups.dp_cp.size() > 1


def connect(chunks: list[DistributedDataParallel]) -> None:
    """Tell Megatron's schedules how to hold the reduction back until the last micro-batch, and let every forward pass
    end with all weights gathered.

    Megatron waits for a module's weights when the module is called. The head is not: its weight is read (see
    model/network.py), and its bucket's gathering would be started and never waited for.
    """
    config = chunks[0].config
    config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    for chunk in chunks:
        chunk.register_forward_hook(_finish_gathering)
        for group in _bucket_groups(chunk):
            group.param_gather_dispatched = True  # nothing to gather before the first optimizer step


def _finish_gathering(ddp: nn.Module, *_: Any) -> None:
    for group in _bucket_groups(ddp):
        group.finish_param_sync()


def gather_weights(ddp: nn.Module) -> None:
    """Bring every weight to the values that the last optimizer step gave it, wherever its owner is. Collective over the
    data-parallel ranks; nothing where they are gathered already, or where nothing overlaps."""
    for chunk in chunks_of(ddp):
        if not isinstance(chunk, DistributedDataParallel) or not chunk.ddp_config.overlap_param_gather:
            continue
        for group in _bucket_groups(chunk):
            if group.param_gather_handle is not None or not group.param_gather_dispatched:
                group.start_param_sync(force_sync=True)


def _bucket_groups(ddp: nn.Module) -> list[Any]:
    return [*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups]  # type: ignore[misc]
