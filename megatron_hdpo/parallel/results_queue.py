"""The queue through which Megatron's checkpoint writers report, in a process that ends with its rank.

Megatron starts that process at a rank's first checkpoint and stops it when the rank ends by itself. Of a rank that is
killed, as torchrun kills all when one fails, it would stay for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing.managers import SyncManager

START_METHOD = "spawn"
_LOOK_S = 1.0


def start_results_queue() -> None:
    """Start it in Megatron's place, once per rank."""
    # Here, as the queue's process imports this module and needs nothing of Megatron.
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context(START_METHOD))
        manager.start(_end_with, (os.getpid(),))
        filesystem_async._results_queue = manager.Queue()


def _end_with(owner: int) -> None:
    """End this process soon after its owner: by then it has another parent."""

    def watch() -> None:
        while os.getppid() == owner:
            time.sleep(_LOOK_S)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
