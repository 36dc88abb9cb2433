"""The interface of a teacher: it scores, and it may follow the policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_hdpo.model.policy import Policy
from megatron_hdpo.weights.host import HostWeights


@dataclass(frozen=True)
class TeacherState:
    """State that a teacher needs at a resume: JSON values, and this rank's shard of its weights."""

    values: dict[str, Any] = field(default_factory=dict)
    weights: HostWeights | None = None


class Teacher(Protocol):
    """A source of the teacher's weights; every method is called on every rank."""

    kind: str

    @property
    def follows_updates(self) -> bool:
        """True if `after_update` reads the policy's weights, which must be gathered then."""

    @contextmanager
    def scorer(self) -> Iterator[Policy]:
        """Yield a policy that holds the teacher's weights until the context ends; use it to score and to copy its head.

        It may be the trained policy itself with other weights in it, so no training may run inside the context.
        """

    def after_update(self) -> None:
        """Follow the policy after an optimizer step; not called for a step that was skipped."""

    def after_step(self) -> None:
        """Follow the policy after all updates of a rollout step."""

    def state_dict(self) -> TeacherState:
        """Return the state that a checkpoint must hold."""

    def load_state_dict(self, values: Mapping[str, Any], weights: HostWeights | None) -> None:
        """Restore the result of `state_dict`; raises WeightsError when the weights are of another model or layout."""


class PolicyTeacher:
    """A teacher that is the policy itself, with its own weights at this step."""

    kind = "policy"
    follows_updates = False

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @contextmanager
    def scorer(self) -> Iterator[Policy]:
        """Yield the policy unchanged."""
        yield self.policy

    def after_update(self) -> None:
        """Do nothing: the teacher is the policy."""

    def after_step(self) -> None:
        """Do nothing: the teacher is the policy."""

    def state_dict(self) -> TeacherState:
        """Return an empty state."""
        return TeacherState()

    def load_state_dict(self, values: Mapping[str, Any], weights: HostWeights | None) -> None:
        """Do nothing: there is no state."""
