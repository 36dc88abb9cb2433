"""Watch over the ranks while they join each other: there is no process group yet, only the job's store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from megatron_hdpo.parallel.heartbeat import End, Heartbeat
from megatron_hdpo.parallel.late import Patience
from megatron_hdpo.parallel.meetings import RankError

PHASE = "join ranks"
_NEEDED = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")


@contextmanager
def joining(patience: Patience, end: End) -> Iterator[None]:
    """Beat while the block runs; `end` gets a line on ranks that do not come, or do not go on.

    Does nothing for a rank alone, or one whose process group exists already. Raises RankError when the store of the job
    cannot be reached.
    """
    if dist.is_initialized() or any(name not in os.environ for name in _NEEDED) or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    # Keys of this attempt: torchrun's store stays when it restarts ranks.
    store = dist.PrefixStore(f"joining/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", _store(patience.process_s))
    heartbeat = Heartbeat(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), patience, end=end)
    heartbeat.phase = heartbeat.progress = lambda: PHASE
    heartbeat.start()
    try:
        yield
    finally:
        heartbeat.close()


def _store(patience_s: float) -> dist.Store:
    """Return a client of the job's store, which does not wait for other ranks; rank 0 keeps it if torchrun does not."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return dist.TCPStore(
            host,
            port,
            is_master=keeps,
            timeout=timedelta(seconds=patience_s),
            wait_for_workers=False,
            multi_tenant=True,  # torch opens the same store when ranks join
        )
    except dist.DistError as error:
        raise RankError(
            f"the job's store at {host}:{port} has not answered for {patience_s:.0f} s "
            f"(parallel.timeout_minutes); rank 0 or torchrun's agent keeps it there: {str(error).splitlines()[0]}"
        ) from error
