"""The evaluation section of the recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class EvaluationConfig(BaseModel):
    """The schedule and the sampling of evaluations on data.evaluation."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    every: int | None = Field(None, ge=1, description="Steps between evaluations; null: before and after only.")
    samples: int = Field(8, ge=1, description="Samples per problem (n).")
    k: list[int] = Field(
        default_factory=lambda: [1, 4, 8], min_length=1, description="pass@k is reported for these k, each <= n."
    )
    temperature: float = Field(1.0, gt=0, description="Sampling temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling.")
    max_new_tokens: int | None = Field(None, ge=1, description="Longest response; default: rollout.max_new_tokens.")
    greedy: bool = Field(True, description="Also sample one greedy response per problem (greedy pass@1).")
    success_threshold: float = Field(1.0, description="Least reward of a right response.")
    before: bool = Field(True, description="Evaluate before the first step.")

    @model_validator(mode="after")
    def _k_within_samples(self) -> EvaluationConfig:
        if too_large := [k for k in self.k if k > self.samples or k < 1]:
            raise ValueError(
                f"k={too_large} cannot be estimated from samples={self.samples}: each k must be 1..samples"
            )
        return self
