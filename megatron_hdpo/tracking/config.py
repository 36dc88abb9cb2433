"""The tracking and profile sections of the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.environment import installed


class WandbConfig(BaseModel):
    """Run, project and mode in Weights & Biases."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    project: str = Field(description="Project that the run belongs to.")
    entity: str | None = Field(default=None, description="Team or user; null: the account's default.")
    name: str | None = Field(default=None, description="Name of the run; null: chosen by W&B.")
    group: str | None = Field(default=None, description="Group that W&B shows this run in.")
    tags: list[str] = Field(default_factory=list, description="Tags of the run.")
    mode: Literal["online", "offline"] = Field(
        default="online", description="offline: write to the run folder, upload later with `wandb sync`."
    )


class MLflowConfig(BaseModel):
    """Server, experiment and run name in MLflow."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    uri: str = Field(description="Tracking server or store, such as http://host:5000 or sqlite:///mlflow.db.")
    experiment: str = Field(default="megatron_hdpo", description="Experiment; created if it does not exist.")
    run_name: str | None = Field(default=None, description="Name of the run; null: chosen by MLflow.")


class TrackingConfig(BaseModel):
    """Progress lines, and copies of the metrics in addition to metrics.jsonl, which is always written."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    progress_seconds: float = Field(
        default=60.0,
        gt=0,
        description="Seconds between two lines about a long phase, in the log file and where output is no terminal.",
    )
    tensorboard: bool | None = Field(
        default=None,
        description="Write TensorBoard events to the run folder; null: where the package tensorboard is installed.",
    )
    wandb: WandbConfig | None = Field(default=None, description="Log to Weights & Biases; null: do not.")
    mlflow: MLflowConfig | None = Field(default=None, description="Log to MLflow; null: do not.")

    @property
    def writes_tensorboard(self) -> bool:
        """Return whether TensorBoard events are written, with null resolved."""
        return installed("tensorboard") if self.tensorboard is None else self.tensorboard

    @property
    def packages(self) -> tuple[str, ...]:
        """Return the packages that the section asks for; each is also the key that asks for it."""
        chosen = {"tensorboard": self.tensorboard, "wandb": self.wandb, "mlflow": self.mlflow}
        return tuple(key for key, asked in chosen.items() if asked)


class ProfileConfig(BaseModel):
    """Traces of chosen steps and ranks, and the peak that MFU is measured against."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    steps: list[int] = Field(
        default_factory=list, description="Steps that are traced, counted from 1 as in metrics.jsonl. Default: none."
    )
    ranks: list[int] = Field(default_factory=lambda: [0], description="Ranks that write a trace of those steps.")
    record_shapes: bool = Field(False, description="Shapes of every operator's inputs in the trace.")
    with_stack: bool = Field(
        False,
        description="Python source lines in the trace, which becomes several times larger.",
    )
    memory: bool = Field(
        False, description="Allocations in the trace; on a GPU also a snapshot for pytorch.org/memory_viz."
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="Peak of one device in TFLOP/s, for MFU; default: the dense bf16 peak where the device is known.",
    )

    def errors(self, world_size: int, steps: int) -> Iterator[str]:
        """Yield the reasons why these steps or ranks cannot be traced, each with its key."""
        if wrong := [step for step in self.steps if not 1 <= step <= steps]:
            yield f"profile.steps: {wrong[0]}: the run has steps 1 to {steps} (train.steps)"
        if wrong := [rank for rank in self.ranks if not 0 <= rank < world_size]:
            yield f"profile.ranks: {wrong[0]}: the run has ranks 0 to {world_size - 1}"
