"""The queue through which Megatron's checkpoint writers report, in a process that ends together with its rank.

Megatron starts that process at a rank's first checkpoint and stops it when the rank exits normally. When a rank is
killed (torchrun kills all ranks when one fails), Megatron's process would run on forever.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.managers import SyncManager

START_METHOD = "spawn"
_POLL_S = 1.0


def start_results_queue() -> None:
    """Start the results queue before Megatron does, once per rank."""
    # Imported here because the queue's process imports this module too and does not need Megatron.
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context(START_METHOD))
        manager.start(_end_with, (os.getpid(),))
        filesystem_async._results_queue = manager.Queue()


def _end_with(owner: int) -> None:
    """Exit this process soon after its parent `owner` (a process id) has died, which gives it another parent.

    The owner may save once more after a signal that torchrun sends to its whole process group.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == owner:
            time.sleep(_POLL_S)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
