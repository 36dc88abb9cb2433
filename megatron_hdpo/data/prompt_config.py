"""The prompts section of the recipe, checked before anything is loaded.

Templates are Jinja2. They and the system message stand in the recipe or in a file of their own: a single word that
ends in .jinja, .txt, .md, ... is its path.
"""

from __future__ import annotations

from datetime import date
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from megatron_hdpo.data.templates import (
    DEFAULT_HINT,
    DEFAULT_PRIVILEGED,
    DEFAULT_STUDENT,
    HINT_VARIABLES,
    PRIVILEGED_VARIABLES,
    STUDENT_VARIABLES,
    check_template,
    read_template,
    variables_of,
)


class PromptConfig(BaseModel):
    """Templates, markers and length limits of the prompts."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    chat: bool = Field(True, description="Wrap prompts by the tokenizer's chat template; else they are raw text.")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Extra variables of the chat template, for example enable_thinking: false."
    )
    privileged_chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="The same for privileged prompts and those with hints, which a teacher reads, over "
        "chat_template_kwargs: enable_thinking: true for the teacher of a student that does not think.",
    )
    date: str = Field(
        "2025-01-01",
        description="The day, as YYYY-MM-DD, that a chat template gets when it asks for today's: all prompts of a run "
        "are the same on every day.",
    )
    system: str | None = Field(
        None, description="System message, or the path of a file with it (.txt, .md, ...); for chat only."
    )
    student: str = Field(DEFAULT_STUDENT, description="Jinja2 template, or its path; variable: question.")
    privileged: str = Field(
        DEFAULT_PRIVILEGED,
        description=f"Jinja2 template, or its path; variables: {', '.join(sorted(PRIVILEGED_VARIABLES))}.",
    )
    privileged_context: Literal["both", "answer", "solution"] = Field(
        "both", description="What of the ground truth the privileged prompt holds; without a solution, the answer."
    )
    hint: str = Field(
        DEFAULT_HINT,
        description="Jinja2 template, or its path, of prompts that show a sibling's response or feedback in place of "
        f"the ground truth; variables: {', '.join(sorted(HINT_VARIABLES))}. One template for right and wrong siblings.",
    )
    hint_keep: Literal["end", "beginning"] = Field(
        "end", description="Which part of a sibling's response stays where it does not fit: its end has the answer."
    )
    reference_begin: str = Field("[REFERENCE]", min_length=1, description="Marker before the ground truth.")
    reference_end: str = Field("[END OF REFERENCE]", min_length=1, description="Marker after the ground truth.")
    max_prompt_tokens: int = Field(1024, ge=1, description="Problems with a longer student prompt are left out.")
    max_privileged_tokens: int | None = Field(
        None,
        ge=1,
        description="Longest privileged prompt, its solution or hint is cut to fit; by default 2 x max_prompt_tokens.",
    )

    @field_validator("date")
    @classmethod
    def _is_a_day(cls, day: str) -> str:
        try:
            return date.fromisoformat(day).isoformat()
        except ValueError as error:
            raise ValueError(f"{day!r} is no day as YYYY-MM-DD: {error}") from error

    @field_validator("student", "privileged", "hint")
    @classmethod
    def _read_file(cls, template: str) -> str:
        return read_template(template)

    @field_validator("system")
    @classmethod
    def _read_system(cls, message: str | None) -> str | None:
        return None if message is None else read_template(message).strip()

    @field_validator("student")
    @classmethod
    def _student_variables(cls, template: str) -> str:
        return check_template(template, STUDENT_VARIABLES)

    @field_validator("privileged")
    @classmethod
    def _privileged_variables(cls, template: str) -> str:
        check_template(template, PRIVILEGED_VARIABLES)
        if not variables_of(template) & {"answer", "solution"}:
            raise ValueError(
                "the template uses neither answer nor solution: its teacher would know no more than the student"
            )
        return template

    @field_validator("hint")
    @classmethod
    def _hint_variables(cls, template: str) -> str:
        check_template(template, HINT_VARIABLES)
        if not variables_of(template) & {"attempt", "feedback"}:
            raise ValueError("the template uses neither attempt nor feedback: every hint would be the same")
        return template

    @model_validator(mode="after")
    def _chat_has_what_it_needs(self) -> PromptConfig:
        if self.system and not self.chat:
            raise ValueError("system: raw prompts have no system message; set chat: true, or leave system out")
        for key in ("chat_template_kwargs", "privileged_chat_template_kwargs"):
            if getattr(self, key) and not self.chat:
                raise ValueError(f"{key}: raw prompts have no chat template; set chat: true, or leave {key} out")
        return self

    @property
    def hint_shows(self) -> frozenset[str]:
        """Return the variables that the hint template uses."""
        return variables_of(self.hint)

    @property
    def privileged_limit(self) -> int:
        """Return the length limit of the privileged prompt in tokens."""
        return self.max_privileged_tokens or 2 * self.max_prompt_tokens
