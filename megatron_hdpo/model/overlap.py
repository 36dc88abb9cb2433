"""Overlap of data-parallel communication with computation.

Gradients are reduced bucket by bucket while the backward pass still runs, and the new weights of an update are gathered
bucket by bucket during the next forward pass.

The second can cause silent errors: after an optimizer step a rank holds new values only for its own part of the
weights, until a forward pass through Megatron's DDP has gathered the others. Code that reads the weights in another way
(a sync to the engine, a checkpoint, a teacher's copy) would read old ones. So `gather_weights` completes them, and an
update ends with it unless its caller says that another update follows at once.
"""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import nn

from megatron_hdpo.model.chunks import chunks_of
from megatron_hdpo.parallel.context import ParallelContext


def overlaps(context: ParallelContext) -> bool:
    """Return whether this run overlaps, from parallel.overlap; by default on GPUs with several replicas.

    On a CPU, gloo's threads would take the cores that compute.
    """
    wanted = context.layout.overlap
    return wanted if isinstance(wanted, bool) else context.device.type == "cuda" and context.groups.dp_cp.size() > 1


def connect(chunks: list[DistributedDataParallel]) -> None:
    """Delay the reduction of gradients to the last micro-batch, and end every forward pass with all weights gathered.

    Megatron waits for a module's weights when the module is called. The head's weight is read directly, never through a
    module call (see model/network.py), so Megatron would start its all-gather and never wait for it.
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
    """Gather the weights of the last optimizer step, so that every rank holds all new values.

    Collective over the data-parallel ranks. Does nothing if the weights are gathered already or nothing overlaps.
    """
    for chunk in chunks_of(ddp):
        if not isinstance(chunk, DistributedDataParallel) or not chunk.ddp_config.overlap_param_gather:
            continue
        for group in _bucket_groups(chunk):
            if group.param_gather_handle is not None or not group.param_gather_dispatched:
                group.start_param_sync(force_sync=True)


def _bucket_groups(ddp: nn.Module) -> list[Any]:
    return [*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups]  # type: ignore[misc]
