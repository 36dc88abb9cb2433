"""The data section of the recipe."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_hdpo.data.leakage import LeakageConfig
from megatron_hdpo.data.prompt_config import PromptConfig
from megatron_hdpo.data.tasks import Task, TaskConfig


class DataConfig(BaseModel):
    """Problems to train and to evaluate on, and their prompts."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    train: list[TaskConfig] = Field(min_length=1, description="Tasks to train on.")
    evaluation: list[TaskConfig] = Field(default_factory=list, description="Tasks to evaluate on.")
    prompts: PromptConfig = Field(
        default_factory=PromptConfig,
        description="Templates and length limits of the prompts.",
    )
    leakage: LeakageConfig = Field(
        default_factory=LeakageConfig,
        description="Filter for privileged responses that reveal their help.",
    )
    seed: int = Field(0, description="Seed of the order of the training problems.")
    decontaminate: bool = Field(
        True,
        description="Drop training problems whose question is also in the evaluation data.",
    )
    cache_dir: Path | None = Field(
        None,
        description="Folder that caches checked problems and parsed gold answers; default: ~/.cache/megatron_hdpo.",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> DataConfig:
        names = [task.task_name for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several tasks are called {', '.join(twice)}: give each its own `name`")
        return self

    @property
    def tasks(self) -> list[Task]:
        """Return all tasks, those to train on first."""
        return [*self.train, *self.evaluation]
