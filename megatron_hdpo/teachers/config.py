"""The teacher section of the recipe: the model that scores for a distillation objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Clock = Literal["rollout_step", "optimizer_step"]
_CLOCK: Clock = Field(
    "rollout_step", description="What is counted: rollout steps, or optimizer steps that were not skipped."
)


class PolicyTeacherConfig(BaseModel):
    """The model itself before this step's update (drifting)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["policy"] = Field("policy", description="The policy's own weights at this step.")


class FrozenTeacherConfig(BaseModel):
    """The model before RL training started: a copy in host memory."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["frozen"] = Field(description="The model before RL training started.")


class SnapshotTeacherConfig(BaseModel):
    """A copy of the policy that is replaced at regular steps."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["snapshot"] = Field(description="A copy of the policy, replaced every `every` steps.")
    every: int = Field(10, ge=1, description="Steps between copies; the first one is the model at the start.")
    clock: Clock = _CLOCK


class EmaTeacherConfig(BaseModel):
    """An exponential moving average of the policy's weights, kept in float32 in host memory."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["ema"] = Field(description="An exponential moving average of the policy's weights.")
    decay: float = Field(0.95, ge=0, lt=1, description="Weight of the old average at each step of the clock.")
    clock: Clock = _CLOCK


class ExternalTeacherConfig(BaseModel):
    """Another Hugging Face checkpoint of the same vocabulary and of any size; it rests in host memory when idle."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["external"] = Field(description="Another checkpoint.")
    path: str = Field(description="Its Hugging Face folder, or its name on the hub, as in model.path.")


TeacherConfig = Annotated[
    PolicyTeacherConfig | FrozenTeacherConfig | SnapshotTeacherConfig | EmaTeacherConfig | ExternalTeacherConfig,
    Field(discriminator="kind"),
]
