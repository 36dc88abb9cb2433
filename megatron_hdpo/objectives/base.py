"""What most objectives answer alike, so that a method's file holds only what is its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from megatron_hdpo.types.learning import Score, Scoring, ScoringKey
from megatron_hdpo.types.rollouts import Group

NO_TOTALS: Mapping[str, float] = MappingProxyType({})


class BaseObjective:
    """No privileged rollouts, no scorings, no totals, no memory. `step` is the present rollout step."""

    max_privileged_prompts: int | None = None
    privileged_top_logprobs: int = 0
    step: int = 0

    def privileged(self, group: Group, step: int) -> int:
        """None: the method learns from the student's own rollouts."""
        return 0

    def begin_step(self, step: int, groups: Sequence[Group]) -> None:
        """Remember the step."""
        self.step = step

    def keep_privileged(self, group: Group) -> Group:
        """All of them."""
        return group

    def has_signal(self, group: Group) -> bool:
        """Whether there is a judged rollout at all."""
        return bool(group.samples)

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """None."""
        return []

    def totals(self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score]) -> dict[str, float]:
        """None."""
        return {}

    def totals_metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """None."""
        return {}

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """None."""
        return {}

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing."""
