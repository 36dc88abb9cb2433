"""What a teacher is to the learner: something that scores, and that may follow the policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_hdpo.model.policy import Policy
from megatron_hdpo.weights.host import HostWeights


@dataclass(frozen=True)
class TeacherState:
    """What a teacher must have back at a resume: JSON values, and this rank's shard of its weights."""

    values: dict[str, Any] = field(default_factory=dict)
    weights: HostWeights | None = None


class Teacher(Protocol):
    """Holds or finds the teacher's weights. Every method is called on every rank."""

    kind: str

    @property
    def follows_updates(self) -> bool:
        """Whether `after_update` reads the policy's weights."""

    @contextmanager
    def scorer(self) -> Iterator[Policy]:
        """Within this context the policy that is handed out holds the teacher's weights: it scores and shows its head.

        It may be the trained policy itself with other weights in it, so nobody may train meanwhile.
        """

    def after_update(self) -> None:
        """An optimizer step was taken (not one that was skipped)."""

    def after_step(self) -> None:
        """A rollout step has been learned from."""

    def state(self) -> TeacherState:
        """What a checkpoint must hold."""

    def load_state(self, values: Mapping[str, Any], weights: HostWeights | None) -> None:
        """Take back what `state` gave. Raises WeightsError when the weights are of another model or layout."""


class PolicyTeacher:
    """The drifting teacher: the policy's own weights at this step."""

    kind = "policy"
    follows_updates = False

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @contextmanager
    def scorer(self) -> Iterator[Policy]:
        """The policy as it is."""
        yield self.policy

    def after_update(self) -> None:
        """Nothing: it is the policy."""

    def after_step(self) -> None:
        """Nothing."""

    def state(self) -> TeacherState:
        """Nothing."""
        return TeacherState()

    def load_state(self, values: Mapping[str, Any], weights: HostWeights | None) -> None:
        """Nothing."""
