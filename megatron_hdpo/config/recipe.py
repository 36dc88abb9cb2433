"""The recipe as a typed tree: the section classes of all rooms, joined.

Each section's class lives in the room that reads it (`<room>/config.py`, an objective's in its own file).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from megatron_hdpo.checkpoint.config import CheckpointConfig
from megatron_hdpo.config.errors import error_lines
from megatron_hdpo.config.secrets import restored
from megatron_hdpo.config.values import meaningless, unreadable
from megatron_hdpo.data.config import DataConfig
from megatron_hdpo.data.tasks import TaskConfig
from megatron_hdpo.evaluation.config import EvaluationConfig
from megatron_hdpo.health.config import HealthConfig, SelfTestConfig
from megatron_hdpo.model.config import ModelConfig, OptimizerConfig
from megatron_hdpo.objectives.registry import ObjectiveConfig
from megatron_hdpo.parallel.layout import ParallelConfig
from megatron_hdpo.rewards.config import RewardConfig
from megatron_hdpo.rollout.config import RolloutConfig
from megatron_hdpo.teachers.config import PolicyTeacherConfig, TeacherConfig
from megatron_hdpo.tracking.config import ProfileConfig, TrackingConfig
from megatron_hdpo.types.errors import UserError


class RecipeError(UserError, ValueError):
    """A recipe that cannot be run; the text has one line per error, each with the path of its key."""


class TrainConfig(BaseModel):
    """The length of the run and the size of its micro-batches."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    steps: int = Field(100, ge=0, description="Rollout steps.")
    updates_per_step: int = Field(1, ge=1, description="Optimizer steps per rollout step, each on a share of it.")
    micro_batch_tokens: int = Field(8192, ge=2, description="Most tokens in a packed micro-batch.")
    head_chunk: int = Field(
        1024,
        ge=1,
        description="Response tokens whose logits exist at a time. More make fewer and larger kernels, for memory: "
        "tokens x vocabulary / tensor x 2 bytes.",
    )
    max_skipped_updates: int = Field(
        3,
        ge=0,
        description="Updates in a row that may be skipped for a gradient that is not finite before the run stops.",
    )
    max_mismatch_k3: float | None = Field(
        0.5,
        gt=0,
        description="The run stops at a train/mismatch_k3 (engine against trainer) beyond this, or one that is not "
        "finite; null: never. Chosen from published runs; experts that trainer and engine choose each for itself (no "
        "rollout.routing_replay) raise it.",
    )


class WarmupConfig(BaseModel):
    """Supervised steps on worked solutions before reinforcement learning, for models too weak to start with."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["none", "sft"] = Field("none", description="sft: supervised fine-tuning; none: no warm-up.")
    steps: int = Field(100, ge=1, description="Optimizer steps.")
    examples_per_step: int = Field(64, ge=1, description="Worked solutions per optimizer step.")
    privileged_share: float = Field(
        0.4,
        ge=0,
        le=1,
        description="Share of the examples that use the privileged prompt.",
    )
    plain: list[TaskConfig] = Field(
        default_factory=list, description="Tasks solved after the student's prompt; default: data.train."
    )
    privileged: list[TaskConfig] = Field(
        default_factory=list, description="Tasks solved after the privileged prompt; default: data.train."
    )
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(lr=1e-5), description="Optimizer of the warm-up, dropped afterwards."
    )


_TEACHER: TypeAdapter[TeacherConfig] = TypeAdapter(TeacherConfig)


class Recipe(BaseModel):
    """All settings of a run."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    output: Path = Field(description="Run folder: metrics, checkpoints, rollouts, logs. An existing one is resumed.")
    seed: int = Field(0, ge=0, description="Seed of data order and sampling.")
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto",
        description="Device that trains the model; auto: cuda if there is a GPU.",
    )
    threads_per_rank: int | None = Field(None, ge=1, description="CPU threads of each rank; default: cores / ranks.")
    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    objective: ObjectiveConfig = Field(description="The method, chosen by its name.")
    teacher: TeacherConfig = Field(
        default_factory=lambda: PolicyTeacherConfig(),
        description="The model that scores for a distillation objective. Without this section it is the one of the "
        "method's paper: frozen for opsd, contrastive_opsd and paced; ema (decay 0.95) for sdpo and srpo; snapshot "
        "(every 10) for rlsd and rlcsd; policy for hdpo; opd, vopd and akl need the section.",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    warmup: WarmupConfig = Field(default_factory=WarmupConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    profile: ProfileConfig = Field(default_factory=ProfileConfig)
    self_test: SelfTestConfig = Field(default_factory=SelfTestConfig)
    health: HealthConfig = Field(default_factory=HealthConfig)

    @model_validator(mode="after")
    def _teacher_of_the_method(self) -> Recipe:
        """Fill in the teacher of the method's paper, so that it stands in the saved recipe too."""
        if "teacher" not in self.model_fields_set and self.objective.default_teacher is not None:
            self.teacher = _TEACHER.validate_python(dict(self.objective.default_teacher))
        return self


def parse_recipe(
    tree: dict[str, Any],
    origin: str = "recipe",
    overrides: Mapping[str, str] | None = None,
    lines: Mapping[str, int] | None = None,
) -> Recipe:
    """Return the typed recipe of a tree. Raises RecipeError with one line per wrong or unknown key.

    origin: where the tree comes from. overrides: by key, the origin of what replaced a part of the tree. lines: by key,
    its line in the file.
    """

    def placed(line: str) -> str:
        path = line.partition(":")[0]
        source = [own for key, own in (overrides or {}).items() if f"{path}.".startswith(f"{key}.")]
        return f"{source[-1] if source else f'{origin}{_line_of(path, lines or {})}'}: {line}"

    def refuse(errors: Iterable[str]) -> None:
        if placed_errors := [placed(line) for line in errors]:
            raise RecipeError("\n".join(placed_errors))

    refuse(unreadable(tree))
    tree, missing = restored(tree, os.environ)
    refuse(missing)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(map(placed, error_lines(error, Recipe)))) from error
    read = recipe.model_dump(mode="json")
    refuse(_booleans_for_numbers(tree, read))
    refuse(meaningless(read))
    return recipe


def _line_of(path: str, lines: Mapping[str, int]) -> str:
    """Return ":12" for the line of a key, or of the section that lacks it; "" where neither is known."""
    while path and path not in lines:
        path = path.rpartition(".")[0]
    return f":{lines[path]}" if path else ""


def _booleans_for_numbers(given: Any, read: Any, path: str = "") -> Iterator[str]:
    """Yield an error for every boolean that pydantic has read as the number 0 or 1."""
    if isinstance(given, bool) and isinstance(read, int | float) and not isinstance(read, bool):
        yield f"{path}: must be a number (given: {str(given).lower()})"
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(given, dict) and isinstance(read, dict):
        children = given.items()
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        children = enumerate(given)
    for key, value in children:
        if isinstance(read, list) or key in read:
            yield from _booleans_for_numbers(value, read[key], f"{path}.{key}" if path else str(key))
