"""Values that wait in host memory while the memory of their device belongs to somebody else.

Storages keep their identity: they are emptied, and later filled in place, so every view of them is valid again.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, UntypedStorage

from megatron_hdpo.types.pinned import host_buffer
from megatron_hdpo.types.transfer import wait_for_copies


@dataclass(frozen=True)
class _Place:
    """A storage, and where its values are in the host's buffer, in bytes."""

    storage: UntypedStorage
    offset: int
    size: int


@dataclass
class MovedStorages:
    """Storages of one device that move to one pinned buffer on the host and back.

    The buffer is kept for the next time, because pinning is slow. away: whether the values are on the host now.
    """

    device: torch.device
    away: bool = False
    _host: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    _places: list[_Place] = field(default_factory=list)
    _pointed: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _stream: torch.cuda.Stream | None = None

    def move_out(self, tensors: Iterable[Tensor], point: Iterable[Tensor] = ()) -> None:
        """Copy the storages of `tensors` to the host and empty them.

        point: tensors of these storages that are to hold the values on the host meanwhile, for readers. No parameter
        of a module may be among them: autograd would forget the hooks on its gradient. Raises PinningError.
        """
        self.wait()
        self._places = _places(tensors)
        size = self._places[-1].offset + self._places[-1].size if self._places else 0
        if len(self._host) != size:
            self._host = torch.empty(0, dtype=torch.uint8)  # first frees the old one
            self._host = host_buffer(size, self.device)
        for place in self._places:
            self._part(place).copy_(_bytes_of(place.storage), non_blocking=True)
        wait_for_copies(self.device)
        for tensor in point:
            self._pointed.append((tensor, tensor.data))
            tensor.data = self.on_host(tensor)
        for place in self._places:
            place.storage.resize_(0)
        self.away = True

    def move_back(self) -> None:
        """Allocate the storages again and start the copy of their values; `wait` before they are used.

        The copy runs beside the kernels of the current stream.
        """
        for place in self._places:
            place.storage.resize_(place.size)
        for tensor, home in self._pointed:
            tensor.data = home
        with self._beside():
            for place in self._places:
                _bytes_of(place.storage).copy_(self._part(place), non_blocking=True)
        self._places, self._pointed, self.away = [], [], False

    def wait(self) -> None:
        """Let the kernels that are launched from now on wait for the values; the host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def on_host(self, tensor: Tensor) -> Tensor:
        """Return the values of a tensor whose storage is away, as a tensor on the host; any other as it is."""
        storage = tensor.untyped_storage()
        place = next((place for place in self._places if place.storage._cdata == storage._cdata), None)
        if place is None:
            return tensor
        start = place.offset // tensor.itemsize + tensor.storage_offset()
        values = torch.empty(0, dtype=tensor.dtype)
        return values.set_(self._host.untyped_storage(), start, tensor.size(), tensor.stride())

    def _part(self, place: _Place) -> Tensor:
        return self._host[place.offset : place.offset + place.size]

    def _beside(self) -> AbstractContextManager[object]:
        """Return the context of a second stream, which begins after what the current one has launched."""
        if self.device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)


_ALIGNMENT = 64  # bytes; values of every type begin at a multiple of their size


def _places(tensors: Iterable[Tensor]) -> list[_Place]:
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    places, offset = [], 0
    for storage in storages.values():
        places.append(_Place(storage, offset, storage.nbytes()))
        offset += -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
    return places


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
