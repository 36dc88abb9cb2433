"""Room on the disk for a checkpoint, looked for before a save is begun: one that fails on its way ends the run."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from torch.distributed.checkpoint.api import CheckpointException

from megatron_hdpo.parallel.context import ParallelContext

RESERVE_BYTES = 64 << 20
"""For descriptions, and for what others write meanwhile."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def problem_of_room(folder: Path, sharded: dict[str, Any], context: ParallelContext) -> str:
    """Return why a checkpoint cannot be written below `folder`, "" if it can. The same on all ranks. Collective.

    sharded: the state as Megatron shards it; of equal parts on several ranks, one writes.
    """
    needed = sum(context.gather_objects(sum(map(_written_bytes, nested_values(sharded))))) + RESERVE_BYTES
    return context.broadcast_object(_problem(folder, needed) if context.is_leader else "")


def problem_of_writing(error: CheckpointException, context: ParallelContext) -> str:
    """Return why the disk took only a part of a checkpoint, "" if that is not the error. Collective, as the error is.

    Another program, or a quota, may leave less room than was seen. Only the leader's error has those of all ranks.
    """
    texts = [str(failure[0]) for failure in error.failures.values()]  # Megatron keeps the text alone
    full = [text for text in texts if any(int(number) in _NO_ROOM for number in re.findall(r"\[Errno (\d+)\]", text))]
    return context.broadcast_object(full[0] if full else "")


def _problem(folder: Path, needed: int) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = free_bytes(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder}: no permission to write"
    if needed > free:
        return f"{folder}: the disk has {free / 1e9:.1f} GB of free space, and a checkpoint needs {needed / 1e9:.1f} GB"
    return ""


def free_bytes(folder: Path) -> int:
    """Return the free space of the folder's file system for this user."""
    return shutil.disk_usage(folder).free


def _written_bytes(value: Any) -> int:
    if not isinstance(value, ShardedTensor | ShardedTensorFactory) or value.data is None:
        return 0
    return value.data.numel() * value.data.element_size() if is_main_replica(value.replica_id) else 0
