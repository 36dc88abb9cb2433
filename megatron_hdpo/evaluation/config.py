"""The evaluation section of the recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator


class EvaluationConfig(BaseModel):
    """The schedule and the sampling of evaluations on data.evaluation."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    every: int | None = Field(None, ge=1, description="Steps between evaluations; null: before and after only.")
    samples: int = Field(8, ge=1, description="Samples per problem (n).")
    task_samples: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="Samples per problem of single tasks of data.evaluation, by their names, in place of `samples`.",
    )
    k: list[int] = Field(
        default_factory=lambda: [1, 4, 8],
        min_length=1,
        description="pass@k is reported for these k, each <= samples; for a task with fewer samples up to those.",
    )
    temperature: float = Field(1.0, gt=0, description="Sampling temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling.")
    top_k: int | None = Field(None, ge=1, description="Sample from the k likeliest tokens; null: from all.")
    max_new_tokens: int | None = Field(None, ge=1, description="Longest response; default: rollout.max_new_tokens.")
    greedy: bool = Field(True, description="Also sample one greedy response per problem (greedy pass@1).")
    success_threshold: float = Field(1.0, description="Least reward of a right response.")
    before: bool = Field(True, description="Evaluate before the first step.")

    @model_validator(mode="after")
    def _k_within_samples(self) -> EvaluationConfig:
        most = max([self.samples, *self.task_samples.values()])
        if too_large := [k for k in self.k if k > most or k < 1]:
            raise ValueError(f"k={too_large} cannot be estimated from samples={most}: each k must be 1..samples")
        return self

    def samples_of(self, task: str) -> int:
        """Return the samples per problem of a task."""
        return self.task_samples.get(task, self.samples)

    def ks_of(self, task: str) -> list[int]:
        """Return the k of pass@k that the task has enough samples for."""
        return [k for k in self.k if k <= self.samples_of(task)]
