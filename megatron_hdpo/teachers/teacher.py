"""Whose weights score a teacher's scorings, and where they rest meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.model.network import HeadlessGPTModel
from megatron_hdpo.weights.host import HostWeights, copy_to_host, load_from_host


class TeacherConfig(BaseModel):
    """The teacher of a distillation objective."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["policy", "frozen"] = Field(
        "policy",
        description="policy: the model itself before this step's update (drifting); frozen: the model as it was when "
        "reinforcement learning began, a real copy that rests in host memory.",
    )


class Teacher(Protocol):
    """Holds or finds the teacher's weights."""

    kind: str

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Within this context the model holds the teacher's weights."""


class PolicyTeacher:
    """The drifting teacher: the policy's own weights at this step."""

    kind = "policy"

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The model as it is."""
        yield


class FrozenTeacher:
    """A copy of this rank's shard taken at construction; swapped in for scoring and out again, bit for bit."""

    kind = "frozen"

    def __init__(self, model: HeadlessGPTModel) -> None:
        self.model = model
        self.copy: HostWeights = copy_to_host(model)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The copy, in place of the policy's weights, which come back also after an error."""
        policy = copy_to_host(self.model)
        load_from_host(self.model, self.copy)
        try:
            yield
        finally:
            load_from_host(self.model, policy)


def build_teacher(config: TeacherConfig, model: HeadlessGPTModel) -> Teacher:
    """The teacher of the recipe, from the weights that the model holds now."""
    return PolicyTeacher() if config.kind == "policy" else FrozenTeacher(model)
