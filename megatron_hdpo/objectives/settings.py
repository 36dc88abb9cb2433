"""Base class of the `objective` sections of a recipe: what the program asks of every method's settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_serializer

from megatron_hdpo.types.learning import SurrogateConfig
from megatron_hdpo.types.plugins import LoadedReference

TeacherKind = Literal["policy", "frozen", "snapshot", "ema", "external"]
OWN_TEACHERS: tuple[TeacherKind, ...] = ("policy", "frozen", "snapshot", "ema")
"""Teachers made of the policy's own weights, current or past: what self-distillation needs."""
OTHER_TEACHERS: tuple[TeacherKind, ...] = ("frozen", "snapshot", "ema", "external")
"""All teachers except the policy itself, which agrees with the student after the same prompt."""
TeacherSection = Mapping[str, Any]
"""The section `teacher` of a recipe."""
POLICY: TeacherSection = MappingProxyType({"kind": "policy"})
FROZEN: TeacherSection = MappingProxyType({"kind": "frozen"})
SNAPSHOT: TeacherSection = MappingProxyType({"kind": "snapshot", "every": 10})
EMA: TeacherSection = MappingProxyType({"kind": "ema", "decay": 0.95})
"""Teachers of the papers."""
ANY_TEACHER: tuple[TeacherKind, ...] = (*OWN_TEACHERS, "external")


@dataclass(frozen=True)
class RecipeContext:
    """Values of other sections that an objective's settings must agree with. temperature: of the rollouts."""

    vocab_size: int
    teacher: TeacherKind
    temperature: float
    updates_per_step: int = 1
    samples_per_prompt: int = 1


class ObjectiveSettings(BaseModel):
    """Base of an objective's settings. Each method of this package narrows `name` to a Literal."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    _reference: LoadedReference | None = PrivateAttr(None)

    name: str = Field("", description="The method: its name here, or a reference to a class of your own.")

    teachers: ClassVar[tuple[TeacherKind, ...]] = ()
    """Kinds of teacher that the method can learn from; () for a method without one."""
    default_teacher: ClassVar[TeacherSection | None] = None
    """The teacher of the method's paper, for recipes without the section. None: a recipe must have it."""
    privileged_prompts: ClassVar[bool] = False
    """Return whether prompts that show the answer are needed with all settings."""

    cliff_threshold: float = Field(
        0.0,
        ge=0,
        description="A prompt is a cliff where no rollout's reward exceeds this, whatever is subtracted from rewards "
        "afterwards: with 0, all rewards are 0. A cliff has no advantages.",
    )

    @property
    def reference(self) -> LoadedReference | None:
        """Return the class that the recipe refers to; None for a method of this package."""
        return self._reference

    @field_serializer("name")
    def _name_as_it_is(self, name: str) -> str:
        """Write a reference where a class inherits the Literal of a method of this package."""
        return name

    @property
    def needs_privileged(self) -> bool:
        """Return whether prompts that show the answer are needed with these settings."""
        return self.privileged_prompts

    @property
    def hint_shows(self) -> frozenset[str]:
        """Return the variables that the hint template must contain: `attempt` (siblings), `feedback`; or none."""
        return frozenset()

    @property
    def needs_reference(self) -> bool:
        """Return whether the method asks for scorings by the reference."""
        return False

    def errors(self, context: RecipeContext) -> Iterator[str]:
        """Yield why the recipe cannot run with these settings, as `key below this section: reason`."""
        yield from ()


def surrogate_of(config: ObjectiveSettings) -> SurrogateConfig | None:
    """Return the section `surrogate` of an objective, or None."""
    return getattr(config, "surrogate", None)
