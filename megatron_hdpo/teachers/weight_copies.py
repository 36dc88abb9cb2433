"""Teachers that are copies of the policy's weights, kept in host memory: frozen, snapshot, moving average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from megatron_hdpo.model.policy import Policy
from megatron_hdpo.teachers.config import EmaTeacherConfig, SnapshotTeacherConfig
from megatron_hdpo.teachers.teacher import TeacherState
from megatron_hdpo.weights.errors import WeightsError
from megatron_hdpo.weights.host import HostWeights, average_into, copy_to_host, load_from_host


class FrozenTeacher:
    """A copy of this rank's shard taken at construction; it replaces the policy's weights during scoring.

    Afterwards the policy's weights are restored bit for bit. dtype: of the copy; default: that of each weight.
    """

    kind = "frozen"
    clock: str | None = None

    @property
    def follows_updates(self) -> bool:
        """True if `after_update` reads the policy's weights."""
        return self.clock == "optimizer_step"

    def __init__(self, policy: Policy, dtype: torch.dtype | None = None) -> None:
        self.policy = policy
        self.copy: HostWeights = copy_to_host(policy.model, dtype=dtype)
        self._own: HostWeights | None = None

    @contextmanager
    def scorer(self) -> Iterator[Policy]:
        """Yield the policy with the copy as its weights; restore its own at the end, also after an error."""
        # Host memory is allocated and pinned at the first scoring, and reused at every later one.
        self._own = copy_to_host(self.policy.model, into=self._own)
        load_from_host(self.policy.model, self.copy, convert=True)
        try:
            yield self.policy
        finally:
            load_from_host(self.policy.model, self._own)

    def after_update(self) -> None:
        """Do nothing: the copy never changes."""

    def after_step(self) -> None:
        """Do nothing: the copy never changes."""

    def state_dict(self) -> TeacherState:
        """Return an empty state: the weights are saved once, in the same folder as the checkpoints."""
        return TeacherState()

    def load_state_dict(self, values: Mapping[str, Any], weights: HostWeights | None) -> None:
        """Do nothing: there is no state."""


class _Following(FrozenTeacher):
    """A copy that follows the policy; `ticks` counts the steps of its clock (rollout or optimizer steps)."""

    def __init__(self, policy: Policy, clock: str, dtype: torch.dtype | None = None) -> None:
        super().__init__(policy, dtype)
        self.clock = clock
        self.ticks = 0

    def after_update(self) -> None:
        """Advance the clock if it counts optimizer steps."""
        if self.clock == "optimizer_step":
            self._tick()

    def after_step(self) -> None:
        """Advance the clock if it counts rollout steps."""
        if self.clock == "rollout_step":
            self._tick()

    def _tick(self) -> None:
        self.ticks += 1
        self._follow()

    def _follow(self) -> None:
        raise NotImplementedError

    def state_dict(self) -> TeacherState:
        """Return the clock's ticks and the copy."""
        return TeacherState({"ticks": self.ticks}, self.copy)

    def load_state_dict(self, values: Mapping[str, Any], weights: HostWeights | None) -> None:
        """Restore the clock's ticks and the copy; raises WeightsError when the weights are missing or do not fit."""
        if weights is None:
            raise WeightsError(f"the checkpoint holds no weights of a teacher of kind {self.kind}")
        _copy_into(self.copy, weights)
        self.ticks = int(values["ticks"])


class SnapshotTeacher(_Following):
    """The policy as it was at the last multiple of `every` ticks."""

    kind = "snapshot"

    def __init__(self, policy: Policy, config: SnapshotTeacherConfig) -> None:
        super().__init__(policy, config.clock)
        self.every = config.every

    def _follow(self) -> None:
        if self.ticks % self.every == 0:
            copy_to_host(self.policy.model, into=self.copy)


class EmaTeacher(_Following):
    """An exponential moving average: copy <- decay * copy + (1 - decay) * policy at every tick of the clock.

    It is kept in float32 for every type of the policy: in bfloat16 the small changes of an average would be rounded
    away.
    """

    kind = "ema"

    def __init__(self, policy: Policy, config: EmaTeacherConfig) -> None:
        super().__init__(policy, config.clock, torch.float32)
        self.decay = config.decay

    def _follow(self) -> None:
        average_into(self.copy, self.policy.model, 1.0 - self.decay)


def _copy_into(copy: HostWeights, weights: HostWeights) -> None:
    wrong = [
        name
        for name in copy.keys() | weights.keys()
        if name not in copy
        or name not in weights
        or (copy[name].shape, copy[name].dtype) != (weights[name].shape, weights[name].dtype)
    ]
    if wrong:
        raise WeightsError(f"the teacher's saved weights are of another model or layout: {sorted(wrong)[0]} differs")
    for name, values in weights.items():
        copy[name].copy_(values)
