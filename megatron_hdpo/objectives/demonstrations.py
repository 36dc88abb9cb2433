"""Demonstrations of SDPO and SRPO: a successful sibling, feedback on the sample, or both; and their divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from megatron_hdpo.data.prompts import Hint
from megatron_hdpo.objectives.siblings import SiblingConfig, right_siblings, sibling_hint
from megatron_hdpo.types.learning import DivergenceConfig
from megatron_hdpo.types.rollouts import Group, JudgedGroup

Source = Literal["sibling", "feedback"]


class DemonstrationConfig(SiblingConfig):
    """Sources of demonstrations, and what is shown of them."""

    sources: list[Source] = Field(
        default=["sibling", "feedback"],
        min_length=1,
        description="sibling: the first other rollout that is right; feedback: the task's text about the rollout.",
    )
    remove_thinking: bool = Field(True, description="Show only the part of a sibling after its last </think>.")

    @property
    def shows(self) -> frozenset[str]:
        """Return the variables that the hint template must contain."""
        return frozenset({"sibling": "attempt", "feedback": "feedback"}[source] for source in self.sources)


def demonstration(group: Group, index: int, config: DemonstrationConfig) -> Hint | None:
    """Return the hint for a sample; None if there is neither a successful sibling nor feedback.

    The sibling's answer is not given separately, because its text ends with it.
    """
    right = right_siblings(group, index, config) if "sibling" in config.sources else []
    feedback = group.samples[index].feedback if "feedback" in config.sources else None
    if not right and not feedback:
        return None
    return Hint(sibling_hint(right[0], config).attempt if right else "", "", feedback or "")


def sdpo_divergence() -> DivergenceConfig:
    """Return SDPO's divergence: JSD on the student's top 100 and a bucket, importance weights up to 2."""
    return DivergenceConfig(coefficient=1.0, tail="bucket", support="student", top_k=100, importance_cap=2.0)


def demonstration_counts(groups: Sequence[Group], config: DemonstrationConfig) -> dict[str, float]:
    """Return the numbers of samples that have a successful sibling, and feedback."""
    hints = [demonstration(group, s, config) for group in groups for s in range(len(group.samples))]
    shown = [hint for hint in hints if hint is not None]
    return {
        "sibling": float(sum(bool(hint.attempt) for hint in shown)),
        "feedback": float(sum(bool(hint.feedback) for hint in shown)),
    }


def demonstration_shares(groups: Sequence[JudgedGroup], counts: Mapping[str, float]) -> dict[str, float]:
    """Return the shares of all samples that have a successful sibling, and feedback; {} without samples.

    counts: the sums of `demonstration_counts` over all groups.
    """
    samples = sum(len(group.samples) for group in groups)
    return {f"distill/{name}_share": counts[name] / samples for name in ("sibling", "feedback")} if samples else {}
