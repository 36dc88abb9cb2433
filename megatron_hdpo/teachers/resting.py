"""Teachers that are the policy at another age: copies of its weights that rest in host memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from megatron_hdpo.model.policy import Policy
from megatron_hdpo.teachers.config import EmaTeacherConfig, SnapshotTeacherConfig
from megatron_hdpo.teachers.teacher import TeacherState
from megatron_hdpo.weights.errors import WeightsError
from megatron_hdpo.weights.host import HostWeights, copy_to_host, load_from_host


class FrozenTeacher:
    """A copy of this rank's shard taken at construction; swapped in for scoring and out again, bit for bit."""

    kind = "frozen"
    clock: str | None = None

    @property
    def follows_updates(self) -> bool:
        """Whether an optimizer step moves it."""
        return self.clock == "optimizer_step"

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.copy: HostWeights = copy_to_host(policy.model)
        self._own: HostWeights | None = None

    @contextmanager
    def scorer(self) -> Iterator[Policy]:
        """The policy with the copy in place of its weights, which come back also after an error."""
        # Host memory is made and pinned at the first scoring, and used again at every later one.
        self._own = copy_to_host(self.policy.model, into=self._own)
        load_from_host(self.policy.model, self.weights())
        try:
            yield self.policy
        finally:
            load_from_host(self.policy.model, self._own)

    def weights(self) -> HostWeights:
        """What is swapped in."""
        return self.copy

    def after_update(self) -> None:
        """Nothing: it stays."""

    def after_step(self) -> None:
        """Nothing: it stays."""

    def state(self) -> TeacherState:
        """Nothing: its weights are saved once, beside the checkpoints."""
        return TeacherState()

    def load_state(self, values: Mapping[str, Any], weights: HostWeights | None) -> None:
        """Nothing."""


class _Following(FrozenTeacher):
    """A copy that follows the policy by a clock, of which `ticks` is the time."""

    def __init__(self, policy: Policy, clock: str) -> None:
        super().__init__(policy)
        self.clock = clock
        self.ticks = 0

    def after_update(self) -> None:
        """A tick of the optimizer's clock."""
        if self.clock == "optimizer_step":
            self._tick()

    def after_step(self) -> None:
        """A tick of the rollouts' clock."""
        if self.clock == "rollout_step":
            self._tick()

    def _tick(self) -> None:
        self.ticks += 1
        self._follow()

    def _follow(self) -> None:
        raise NotImplementedError

    def state(self) -> TeacherState:
        """The clock and the copy."""
        return TeacherState({"ticks": self.ticks}, self.copy)

    def load_state(self, values: Mapping[str, Any], weights: HostWeights | None) -> None:
        """Go on from there."""
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
    """copy <- decay * copy + (1 - decay) * policy at every tick, in float32 whatever the policy's type: in bfloat16 the
    small steps of an average would round to none."""

    kind = "ema"

    def __init__(self, policy: Policy, config: EmaTeacherConfig) -> None:
        super().__init__(policy, config.clock)
        self.decay = config.decay
        self.copy = {name: values.float() for name, values in self.copy.items()}

    def weights(self) -> HostWeights:
        """The average in the policy's types."""
        types = {name: parameter.dtype for name, parameter in self.policy.model.named_parameters()}
        return {name: values.to(types[name]) for name, values in self.copy.items()}

    def _follow(self) -> None:
        with torch.no_grad():
            for name, parameter in self.policy.model.named_parameters():
                self.copy[name].lerp_(parameter.detach().to("cpu", torch.float32), 1.0 - self.decay)


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
