"""The reward section of the recipe."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from megatron_hdpo.rewards.functions import (
    AnswerFormat,
    HttpService,
    OverlongPenalty,
    RewardFunction,
    TaskScore,
    check_functions,
)
from megatron_hdpo.rewards.own_function import GROUP, own_function
from megatron_hdpo.types.open_union import OpenUnion

FUNCTIONS: tuple[type[RewardFunction], ...] = (TaskScore, AnswerFormat, OverlongPenalty, HttpService)
"""The reward functions of this package."""

FunctionConfig = Annotated[RewardFunction, OpenUnion(FUNCTIONS, "kind", GROUP, own_function)]
"""Section of a reward function: one of FUNCTIONS, chosen by its kind, or one that the kind refers to."""


class RewardConfig(BaseModel):
    """Reward functions, and the worker processes that score responses with their limits."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    functions: list[FunctionConfig] | None = Field(
        None,
        description="The reward is the sum of their values times their weights. Default: the score of the task.",
    )
    workers: int | None = Field(None, ge=1, description="Worker processes; by default half the cores, at most 16.")
    time_limit_s: float = Field(
        5.0,
        gt=0,
        description="Seconds of processor time after which the worker of a check is killed; a busy machine changes "
        "nothing.",
    )
    hang_limit_s: float = Field(
        60.0, gt=0, description="Seconds on the clock after which the worker of a check that only waits is killed."
    )
    max_retries: int = Field(1, ge=0, description="Retries of a failed check before it counts as failed.")
    memory_limit_mib: int | None = Field(
        2048, ge=64, description="Memory that a worker may take beyond its libraries (Linux); null for no limit."
    )

    @field_validator("functions")
    @classmethod
    def _fit_together(cls, functions: list[FunctionConfig] | None) -> list[FunctionConfig] | None:
        if functions is not None:
            check_functions(functions)
        return functions

    @property
    def worker_count(self) -> int:
        """Return the number of worker processes."""
        return self.workers or max(1, min(16, (os.cpu_count() or 1) // 2))
