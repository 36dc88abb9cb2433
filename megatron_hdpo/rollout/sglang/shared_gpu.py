"""Turns on a GPU that a rank of the trainer and a colocated server share.

The server has its memory while it samples, the trainer the rest of the time. Neither side sees the other's allocator,
so both handovers are checked here by the memory that the GPU reports as free.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from megatron_hdpo.model.trainer_memory import TrainerMemory
from megatron_hdpo.types.errors import UserError

LOGGER = logging.getLogger(__name__)
GIB = 2**30
POLL_S = 0.05
RELEASE_TIMEOUT_S = 60.0
RELEASED_SHARE = 0.8
"""Share of the memory that a server reports as occupied; the rest may be outside of what it can release."""


class MemoryShortageError(UserError, RuntimeError):
    """A server cannot take back the memory that it released; the message has the numbers and says what to do."""


class GpuMemory(Protocol):
    """Memory of this rank's GPU, in bytes."""

    def free(self) -> int:
        """Return what no process occupies."""

    def in_use(self) -> int:
        """Return what this process's tensors occupy."""

    def release_cached(self) -> None:
        """Return what this process has reserved and does not use to the GPU."""


class CudaMemory:
    """Memory of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free(self) -> int:
        """Return what no process occupies."""
        return torch.cuda.mem_get_info(self.device)[0]

    def free_share(self) -> float:
        """Return what no process occupies as a share of the whole."""
        free, total = torch.cuda.mem_get_info(self.device)
        return free / total

    def in_use(self) -> int:
        """Return what this process's tensors occupy."""
        return torch.cuda.memory_allocated(self.device)

    def release_cached(self) -> None:
        """Return the blocks of the caching allocator, and those that servers no longer open, to the GPU."""
        with torch.cuda.device(self.device):
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()


class HostMemory:
    """Stand-in for the memory of a GPU on a CPU, where trainer and servers have the same memory: nothing is counted."""

    def free(self) -> int:
        """Return 0."""
        return 0

    def in_use(self) -> int:
        """Return 0."""
        return 0

    def release_cached(self) -> None:
        """Do nothing."""


class SharedGpu:
    """A rank's side of the turns; every method is collective over all ranks of the trainer.

    owner: rank that started the server on this GPU, None on a GPU without one. gather: collects a value of every rank,
    in rank order. trainer: moves the rank's training state away while servers have the GPU; None: it stays.
    """

    def __init__(
        self,
        memory: GpuMemory,
        owner: int | None,
        gather: Callable[[Any], list[Any]],
        trainer: TrainerMemory | None = None,
        release_timeout_s: float = RELEASE_TIMEOUT_S,
    ) -> None:
        self.memory, self.owner, self.gather, self.trainer = memory, owner, gather, trainer
        self.release_timeout_s = release_timeout_s
        self._received = 0

    def receive(self, release: Callable[[], int]) -> None:
        """Run `release`, by which this rank's server releases its memory; wait until this GPU has it, and move in.

        release: returns the bytes that the server occupied on each of its GPUs, as it reports them; 0 if unknown. A
        server may answer before all of its processes have released theirs. After a deadline a warning is logged.
        """
        before = self.memory.free()
        self.gather(None)  # no server may release before every rank has looked
        occupied = self._of_owner(release(), 0)
        wanted = int(occupied * RELEASED_SHARE)
        deadline = time.monotonic() + self.release_timeout_s
        while (received := self.memory.free() - before) < wanted and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if received < wanted:
            LOGGER.warning(
                "the SGLang server of rank %s occupied %.1f GiB of this GPU and has released %.1f GiB within %g s: "
                "training may run out of memory", self.owner, occupied / GIB, received / GIB, self.release_timeout_s
            )  # fmt: skip
        self._received += max(received, 0)
        if self.trainer is not None:
            self.trainer.come_back()

    def give_back(self, asleep: bool, weights: bool = False) -> None:
        """Move the trainer's state away, and return cached memory to the GPU, before servers take theirs.

        asleep: whether this rank's server has released its memory. weights: whether the trainer's weights may leave,
        too. Raises MemoryShortageError, on every rank, when less is free on a GPU than its server released there.
        """
        # First, because it is a meeting of all ranks: by now servers have read what other ranks sent.
        wanted = self._received if self._of_owner(asleep, False) else 0
        self._received = 0
        to_leave = 0
        if self.trainer is not None:
            self.trainer.make_room(weights)
            to_leave = self.trainer.weights_to_leave()
        self.memory.release_cached()
        free, problem = self.memory.free() + to_leave, ""
        if free < wanted:
            problem = (
                f"the SGLang server of rank {self.owner} released {wanted / GIB:.1f} GiB to the trainer and cannot "
                f"take them back: {free / GIB:.1f} GiB are free, the trainer's tensors occupy "
                f"{self.memory.in_use() / GIB:.1f} GiB; lower rollout.sglang.servers.mem_fraction_static, or let more "
                "of them leave (rollout.sglang.trainer_memory)"
            )
        if problems := [text for text in self.gather(problem) if text]:
            more = f" (and {len(problems) - 1} more GPUs)" if len(problems) > 1 else ""
            raise MemoryShortageError(problems[0] + more)

    def _of_owner(self, mine: Any, default: Any) -> Any:
        """Return the value of the rank that owns this GPU's server."""
        values = self.gather(mine)
        return default if self.owner is None else values[self.owner]
