"""Memory that only the trainer's own phases need, and that servers on the same GPUs have meanwhile.

Gradients are dropped: every update begins with zeros. The optimizer's state (main weights, moments) waits in pinned
memory of the host, and by choice the weights do, too. The state comes back while the teacher scores and the first
micro-batches run: it is waited for before the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from megatron_hdpo.model.chunks import chunks_of
from megatron_hdpo.model.moved_storages import MovedStorages
from megatron_hdpo.types.errors import UserError
from megatron_hdpo.types.pinned import PinningError

if TYPE_CHECKING:
    from megatron_hdpo.model.policy import Policy

Leaving = Literal["optimizer", "all"]


class TrainerMemoryError(UserError, RuntimeError):
    """The trainer's memory cannot be moved; the message says why, and what to do."""


class TrainerMemory:
    """Moves a policy's training state off its device and back. Not collective, but every rank must do the same.

    leaving: what goes to the host: the optimizer's state, or with it the weights. The policy's optimizer is read at
    every move, so it may be built or replaced later. While anything is away, neither score nor update; a checkpoint
    can be saved.
    """

    def __init__(self, policy: Policy, leaving: Leaving) -> None:
        self.policy, self.leaving = policy, leaving
        device = policy.context.device
        self._state, self._weights = MovedStorages(device), MovedStorages(device)
        policy.memory = self

    @property
    def weights_away(self) -> bool:
        """Return whether the weights are in host memory now."""
        return self._weights.away

    @property
    def away(self) -> bool:
        """Return whether anything is in host memory now."""
        return self._state.away or self._weights.away

    def weights_to_leave(self) -> int:
        """Return the bytes of weights that are on the device and leave it in `make_room(weights=True)`."""
        if self.leaving == "optimizer" or self.weights_away:
            return 0
        return sum(buffer.param_data.nbytes for buffer in self._buffers())

    def make_room(self, weights: bool) -> None:
        """Move the optimizer's state, with `weights` also the weights, to the host, and free the gradients.

        Does nothing for what is away already. Raises TrainerMemoryError if the host has no memory to pin.
        """
        try:
            if not self._state.away:
                self._move_state()
            if weights and self.weights_to_leave():
                self._move_weights()
        except PinningError as error:
            raise TrainerMemoryError(
                f"rollout.sglang.trainer_memory={self.leaving}: {error}: free memory on this machine, or set it to keep"
            ) from error

    def come_back(self) -> None:
        """Allocate everything again and start the copies; the weights can be used at once, gradients are zeros."""
        if self._weights.away:
            self._weights.move_back()
            self._weights.wait()
        if self._state.away:
            for gradients in self._gradients():
                gradients.untyped_storage().resize_(gradients.nbytes)
                gradients.zero_()
            self._state.move_back()

    def wait(self) -> None:
        """Let the optimizer's step wait for its state."""
        self._state.wait()

    def check_at_home(self) -> None:
        """Raise RuntimeError if anything is away: its values cannot be computed with."""
        if self.away:
            raise RuntimeError("the trainer's memory belongs to the servers: call the engine's make_room first")

    def on_host(self, tensor: Tensor) -> Tensor:
        """Return the values of a weight that is away, as a tensor on the host; any other tensor as it is."""
        return self._weights.on_host(tensor)

    def _move_state(self) -> None:
        weights = _Views(self._weight_buffers())
        state = [tensor for tensor in self._optimizer_tensors() if tensor not in weights]
        with self.policy.context.megatron_calls():
            if self.policy.optimizer is not None:
                self.policy.optimizer.zero_grad()  # its references to the gradients
        self._state.move_out(state, point=state)
        for gradients in self._gradients():
            gradients.untyped_storage().resize_(0)

    def _move_weights(self) -> None:
        weights = _Views(self._weight_buffers())
        # In float32 the optimizer's parameters are views of the model's.
        views = [tensor for tensor in self._optimizer_tensors() if tensor in weights]
        self._weights.move_out(self._weight_buffers(), point=views)

    def _buffers(self) -> Iterator[Any]:
        for chunk in chunks_of(self.policy.ddp):
            yield from (*chunk.buffers, *chunk.expert_parallel_buffers)

    def _gradients(self) -> list[Tensor]:
        return [buffer.grad_data for buffer in self._buffers()]

    def _weight_buffers(self) -> list[Tensor]:
        return [buffer.param_data for buffer in self._buffers()]

    def _optimizer_tensors(self) -> list[Tensor]:
        """Return the tensors on this device that the optimizer's parts hold, each once."""
        found: dict[int, Tensor] = {}
        for part in [] if self.policy.optimizer is None else self.policy.optimizer.chained_optimizers:
            inner = getattr(part, "optimizer", None)
            for holder in () if inner is None else (inner, *getattr(inner, "sub_optimizers", ())):
                parameters = (parameter for group in holder.param_groups for parameter in group["params"])
                moments = (value for values in holder.state.values() for value in values.values())
                held = (t for t in (*parameters, *moments) if isinstance(t, Tensor) and t.device == self._device)
                found |= {id(tensor): tensor for tensor in held if tensor.untyped_storage().nbytes()}
        return list(found.values())

    @property
    def _device(self) -> torch.device:
        return self._gradients()[0].device


class _Views:
    """Set of the tensors that are views of some buffers."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self._storages = {buffer.untyped_storage()._cdata for buffer in buffers}

    def __contains__(self, tensor: object) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._storages
