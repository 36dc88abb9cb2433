"""End of a command on this rank, and what it knows of the end of other ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from torch.distributed import Store

USER_ERROR = 2
_FAILED = "megatron_hdpo/failed"


def leave(code: int) -> NoReturn:
    """End the process at once, with its child processes.

    Other ranks may wait in a collective, and a normal exit would wait for them. Child processes would hold our output
    open for a while, so they are killed as a normal exit would do.
    """
    sys.stdout.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def end_with(message: str) -> NoReturn:
    """End this rank with an error of the user's, printed once for all ranks; torchrun's summary shows it too."""
    _tell_agent(message)
    if first_to_fail():
        print(message, file=sys.stderr, flush=True)
    leave(USER_ERROR)


def end_of_stall(verdict: str) -> NoReturn:
    """End this rank because of others that are late, while its main thread waits and cannot raise RankError."""
    end_with(f"RankError: {verdict}")


def _tell_agent(message: str) -> None:
    """Write the file that torchrun's summary shows beside the exit code; without torchrun there is none."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        error = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": error}))


def first_to_fail() -> bool:
    """Return whether this rank prints the message: an error on every rank is printed once, one on rank 3 alone too.

    Ranks count themselves in torchrun's own store, which exists before any process group, or in that of rank 0; without
    a store, the first rank of each node prints.
    """
    try:
        if (store := _agent_store()) is not None:
            return store.add(_FAILED, 1) == 1
    except RuntimeError:  # rank 0 has ended meanwhile, and the store with it
        pass
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return True
    time.sleep(5)  # torchrun ends all ranks of a node when one has ended: let the first one speak before that
    return False


def another_failed() -> bool:
    """Return whether another rank has already ended with its own message; a failure here only follows from it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    store = _agent_store()
    if store is None:  # where rank 0 keeps the store, it is gone with rank 0
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "False" and os.environ.get("RANK") != "0"
    time.sleep(0.5)  # a connection may break a moment before the rank at its other end has counted itself
    try:
        return bool(store.check([_FAILED]))
    except RuntimeError:
        return True


def _agent_store() -> Store | None:
    """Return torchrun's store, or rank 0's where agents do not share theirs (rank 0's is new after each restart)."""
    if "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        return None
    from torch.distributed import PrefixStore, TCPStore, is_initialized

    of_agents = os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    if not of_agents and not is_initialized():
        return None
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=10 if of_agents else 2)
        store = TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)
        return PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if of_agents else "0", store)
    except (KeyError, ValueError, RuntimeError):
        return None
