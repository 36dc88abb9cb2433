"""What SDPO and SRPO show the teacher of a rollout: a successful sibling, feedback on the rollout, or both."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_hdpo.data.prompts import Hint
from megatron_hdpo.objectives.siblings import SiblingConfig, right_siblings, sibling_hint
from megatron_hdpo.types.rollouts import Group

Source = Literal["sibling", "feedback"]


class DemonstrationConfig(SiblingConfig):
    """Where demonstrations come from."""

    sources: list[Source] = Field(
        default=["sibling", "feedback"],
        min_length=1,
        description="sibling: the first other rollout that is right; feedback: what the task says of the rollout.",
    )
    remove_thinking: bool = Field(True, description="Show a sibling from its last </think> on.")

    @property
    def shows(self) -> frozenset[str]:
        """Variables of the hint template that must be in it."""
        return frozenset({"sibling": "attempt", "feedback": "feedback"}[source] for source in self.sources)


def demonstration(group: Group, index: int, config: DemonstrationConfig) -> Hint | None:
    """The hint for a sample, None when there is neither a successful sibling nor feedback. A sibling comes without its
    answer besides: its text ends in it."""
    right = right_siblings(group, index, config) if "sibling" in config.sources else []
    feedback = group.samples[index].feedback if "feedback" in config.sources else None
    if not right and not feedback:
        return None
    return Hint(sibling_hint(right[0], config).attempt if right else "", "", feedback or "")
