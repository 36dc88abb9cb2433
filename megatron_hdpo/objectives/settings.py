"""What the rest of the program can ask an objective's section of a recipe, whatever the method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from megatron_hdpo.types.learning import SurrogateConfig

TeacherKind = Literal["policy", "frozen", "snapshot", "ema", "external"]
OWN_TEACHERS: tuple[TeacherKind, ...] = ("policy", "frozen", "snapshot", "ema")
"""The policy at one age or another: what self-distillation needs."""
OTHER_TEACHERS: tuple[TeacherKind, ...] = ("frozen", "snapshot", "ema", "external")
"""All but the policy itself, which agrees with the student after the same prompt."""
ANY_TEACHER: tuple[TeacherKind, ...] = (*OWN_TEACHERS, "external")


@dataclass(frozen=True)
class Surroundings:
    """What of the rest of a recipe an objective's settings must agree with. temperature: of the rollouts."""

    vocab_size: int
    teacher: TeacherKind
    temperature: float
    updates_per_step: int = 1
    samples_per_prompt: int = 1


class ObjectiveSettings(BaseModel):
    """What every objective's section of a recipe can be asked. A section has a `name`, a Literal, besides."""

    model_config = ConfigDict(extra="forbid")

    teachers: ClassVar[tuple[TeacherKind, ...]] = ()
    """Teachers that the method can learn from; () for a method without one."""
    privileged_prompts: ClassVar[bool] = False
    """Whether prompts that show the answer are needed, whatever the settings."""

    @property
    def needs_privileged(self) -> bool:
        """Whether prompts that show the answer are needed with these settings."""
        return self.privileged_prompts

    @property
    def hint_shows(self) -> frozenset[str]:
        """Variables that the template of hints must show: `attempt` for siblings, `feedback`; empty without hints."""
        return frozenset()

    @property
    def needs_reference(self) -> bool:
        """Whether scorings by the reference policy are asked for."""
        return False

    def errors(self, around: Surroundings) -> Iterator[str]:
        """Why the recipe cannot be run with these settings, as `key below this section: reason`."""
        yield from ()


def surrogate_of(config: ObjectiveSettings) -> SurrogateConfig | None:
    """The section `surrogate` of an objective that has one."""
    return getattr(config, "surrogate", None)
