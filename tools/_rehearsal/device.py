"""What the null GPU counted: the Python side of the library in `device/`. Only in a process on it (see launch.py)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Kind = Literal["K", "G", "N", "H", "D", "C", "S"]
Memory = Literal["device", "pinned", "pinned_peak", "occupied", "free"]


@dataclass(frozen=True)
class Count:
    """Number of times that one thing happened.

    kind: K launch of a kernel or product, G matrix product (a, b, c: m, n, k), N collective (a: bytes, b: number of the
    communicator, c: ranks), H, D, C copy to, from and within the device (a: bytes, b: 1 if to or from pageable
    memory), S call that waits for the device.
    """

    kind: Kind
    name: str
    a: int
    b: int
    c: int
    times: int


class NullGpu:
    """The device of this process."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)  # LD_PRELOAD made its names global
        library.nullgpu_counts.restype = ctypes.c_char_p
        library.nullgpu_communicators.restype = ctypes.c_char_p
        library.nullgpu_flops.restype = ctypes.c_double
        library.nullgpu_bytes.restype = ctypes.c_long
        library.nullgpu_occupy.argtypes = [ctypes.c_long]
        library.nullgpu_answer.argtypes = [ctypes.c_char_p, ctypes.c_long]
        self.group_of: dict[str, str] = {}
        """Name of the process group by the id of its communicator (`OneRankStore.group_of`)."""
        self._library = library

    def counting(self, on: bool) -> None:
        """Count from now on, or stop."""
        self._library.nullgpu_counting(int(on))

    def clear(self) -> None:
        """Forget all counts; the peak of pinned memory begins anew."""
        self._library.nullgpu_clear()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what the block does, and nothing that was before it."""
        self.clear()
        self.counting(True)
        try:
            yield
        finally:
            self.counting(False)

    def counts(self) -> list[Count]:
        """Return everything that was counted since `clear`."""
        lines = self._library.nullgpu_counts().decode().splitlines()
        return [Count(kind, name, *map(int, rest)) for kind, name, *rest in (line.split("\t") for line in lines)]  # type: ignore[arg-type]

    def total(self, kind: Kind) -> int:
        """Return how often something of a kind happened."""
        return sum(count.times for count in self.counts() if count.kind == kind)

    def communicators(self) -> dict[int, str]:
        """Return the name of the process group of each communicator, by its number."""
        lines = (line.split("\t") for line in self._library.nullgpu_communicators().decode().splitlines())
        return {int(number): self.group_of.get(name, name) for number, name in lines}

    def flops(self) -> float:
        """Return the FLOPs of the matrix products; kernels (attention's too) are not among them."""
        return float(self._library.nullgpu_flops())

    def num_bytes(self, what: Memory) -> int:
        """Return bytes: allocated on the device, pinned on the host, occupied by other processes, or free."""
        return int(self._library.nullgpu_bytes(what.encode()))

    def occupy(self, num_bytes: int) -> bool:
        """Take memory as another process on the GPU does (negative: give it back). Return whether there was room."""
        return bool(self._library.nullgpu_occupy(num_bytes))

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Let broadcasts that begin in the block never end, until a communicator is aborted (counted: N, "Abort")."""
        self._library.nullgpu_hang(1)
        try:
            yield
        finally:
            self._library.nullgpu_hang(0)

    def answer(self, value: bytes) -> None:
        """Let the next copy of len(value) bytes from the device to the host give `value`."""
        self._library.nullgpu_answer(value, len(value))

    @contextmanager
    def answering(self, *values: bytes) -> Iterator[None]:
        """Let copies within the block give `values`, in order; those that nothing asked for are dropped."""
        self._library.nullgpu_answer(b"", 0)
        for value in values:
            self.answer(value)
        try:
            yield
        finally:
            self._library.nullgpu_answer(b"", 0)
