"""From a problem to prompt token ids: the student's prompt, and the privileged one that also holds the ground truth.

Templates are Jinja2, in the recipe or in a file of their own (a single line that ends in .jinja or .j2 is a path).
They are rendered in a sandbox, and a variable that they do not know is an error before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import jinja2
import jinja2.meta
import jinja2.sandbox
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from megatron_hdpo.data.errors import DataError
from megatron_hdpo.data.problem import Problem

DEFAULT_STUDENT = """{{ question }}

Reason step by step, and put your final answer within \\boxed{}."""

DEFAULT_PRIVILEGED = (
    """{{ question }}

{{ reference_begin }}
{% if solution %}{{ solution }}
{% endif %}{% if answer %}Final answer: {{ answer }}
{% endif %}{{ reference_end }}

"""
    "The reference above is for your eyes only. Understand why it is right, then write your own complete solution to "
    "the problem, as if you had found it without help and without mentioning the reference. Reason step by step, and "
    "put your final answer within \\boxed{}."
)

STUDENT_VARIABLES = frozenset({"question"})
PRIVILEGED_VARIABLES = frozenset({"question", "answer", "solution", "reference_begin", "reference_end"})
TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2")


class PromptTooLong(DataError):
    """A prompt over max_prompt_tokens that cannot be shortened without losing its problem."""


class TokenizerLike(Protocol):
    """What prompts need of a Hugging Face tokenizer."""

    eos_token_id: int | None
    unk_token_id: int | None
    all_special_tokens: Sequence[str]

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = ...) -> str: ...


class PromptConfig(BaseModel):
    """How problems become prompts."""

    model_config = ConfigDict(extra="forbid")

    chat: bool = Field(True, description="Wrap prompts by the tokenizer's chat template; else they are raw text.")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Extra variables of the chat template, for example enable_thinking: false."
    )
    system: str | None = Field(None, description="System message, or a path to it; for chat only.")
    student: str = Field(DEFAULT_STUDENT, description="Jinja2 template, or its path; variable: question.")
    privileged: str = Field(
        DEFAULT_PRIVILEGED,
        description=f"Jinja2 template, or its path; variables: {', '.join(sorted(PRIVILEGED_VARIABLES))}.",
    )
    privileged_context: Literal["both", "answer", "solution"] = Field(
        "both", description="What of the ground truth the privileged prompt holds; without a solution, the answer."
    )
    reference_begin: str = Field("[REFERENCE]", min_length=1, description="Marker before the ground truth.")
    reference_end: str = Field("[END OF REFERENCE]", min_length=1, description="Marker after the ground truth.")
    max_prompt_tokens: int = Field(1024, ge=1, description="Problems with a longer student prompt are left out.")
    max_privileged_tokens: int | None = Field(
        None,
        ge=1,
        description="Longest privileged prompt, its solution is cut to fit; by default 2 x max_prompt_tokens.",
    )

    @field_validator("system", "student", "privileged")
    @classmethod
    def _read_file(cls, template: str | None) -> str | None:
        if template is None or "\n" in template or not template.endswith(TEMPLATE_SUFFIXES):
            return template
        try:
            return Path(template).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot read the template file {template}: {error.strerror}") from error

    @field_validator("student")
    @classmethod
    def _student_variables(cls, template: str) -> str:
        return check_template(template, STUDENT_VARIABLES)

    @field_validator("privileged")
    @classmethod
    def _privileged_variables(cls, template: str) -> str:
        check_template(template, PRIVILEGED_VARIABLES)
        if not jinja2.meta.find_undeclared_variables(_environment().parse(template)) & {"answer", "solution"}:
            raise ValueError(
                "the template uses neither answer nor solution: its teacher would know no more than the student"
            )
        return template

    @property
    def privileged_limit(self) -> int:
        """Longest privileged prompt in tokens."""
        return self.max_privileged_tokens or 2 * self.max_prompt_tokens


def check_template(template: str, variables: frozenset[str]) -> str:
    """The template itself. Raises ValueError when it does not parse, uses other variables or omits the question."""
    try:
        used = jinja2.meta.find_undeclared_variables(_environment().parse(template))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the template does not parse: {error.message} (its line {error.lineno})") from error
    if unknown := used - variables:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"the template uses unknown variables: {names}; it may use: {', '.join(sorted(variables))}")
    if "question" not in used:
        raise ValueError("the template does not use the variable question, so every prompt would be the same")
    return template


class PromptBuilder:
    """Renders and encodes prompts with one tokenizer. Stateless after construction."""

    def __init__(self, tokenizer: TokenizerLike, config: PromptConfig) -> None:
        if config.chat and not getattr(tokenizer, "chat_template", None):
            raise DataError("data.prompts.chat is true, but the tokenizer has no chat template; set it to false")
        self.tokenizer, self.config = tokenizer, config
        environment = _environment()
        self._student = environment.from_string(config.student)
        self._privileged = environment.from_string(config.privileged)
        self._overhead = len(self._wrap("").encode()) + 2
        self._try_templates()

    @property
    def markers(self) -> tuple[str, str]:
        """The reference markers: a response that quotes them has leaked its prompt."""
        return self.config.reference_begin, self.config.reference_end

    def render_student(self, problem: Problem) -> str:
        """Text of the student's prompt, chat template included."""
        return self._wrap(self._student.render(question=problem.question))

    def render_privileged(self, problem: Problem, solution: str | None = None) -> str:
        """Text of the privileged prompt, chat template included; `solution` stands in for the problem's own."""
        return self._wrap(self._render_reference(problem, problem.solution if solution is None else solution))

    def student(self, problem: Problem) -> np.ndarray:
        """Ids int32 [P] of the student's prompt. Raises PromptTooLong beyond max_prompt_tokens, DataError for text that
        the tokenizer cannot express."""
        ids = self.encode(self.render_student(problem))
        if len(ids) > self.config.max_prompt_tokens:
            limit = self.config.max_prompt_tokens
            raise PromptTooLong(f"{problem.id}: the prompt has {len(ids)} tokens, max_prompt_tokens is {limit}")
        return ids

    def privileged(self, problem: Problem) -> np.ndarray:
        """Ids int32 [P] of the privileged prompt; a solution that does not fit is cut at its end, and the answer is
        then given besides. Raises PromptTooLong when even the answer alone does not fit."""
        ids = self.encode(self.render_privileged(problem))
        limit, solution = self.config.privileged_limit, problem.solution
        while len(ids) > limit and solution:
            solution = self._shortened(solution, len(ids) - limit)
            ids = self.encode(self._wrap(self._render_reference(problem, solution, cut=True)))
        if len(ids) > limit:
            raise PromptTooLong(
                f"{problem.id}: the privileged prompt has {len(ids)} tokens without any solution, "
                f"the limit is {limit}; raise max_privileged_tokens"
            )
        return ids

    def check_length(self, problem: Problem, privileged: bool) -> None:
        """Raise PromptTooLong where `student`, or with `privileged` also `privileged`, would.

        Byte-level tokenizers give at most one token per byte: what is short enough in bytes is not encoded.
        """
        if self._most_tokens(self._student.render(question=problem.question)) > self.config.max_prompt_tokens:
            self.student(problem)
        if not privileged:
            return
        if self._most_tokens(self._render_reference(problem, problem.solution)) > self.config.privileged_limit:
            self.privileged(problem)

    def encode(self, text: str) -> np.ndarray:
        """Ids int32 of rendered text. A chat template brings its own special tokens; raw text gets the tokenizer's,
        without an end of sequence. Raises DataError for text that the tokenizer has no tokens for."""
        ids = list(self.tokenizer.encode(text, add_special_tokens=not self.config.chat))
        if not self.config.chat and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids and self.tokenizer.decode([unknown]) not in text:
            raise DataError(f"the tokenizer has no token for some characters of this prompt: {text[:200]!r}")
        return np.asarray(ids, dtype=np.int32)

    def foreign_special_token(self, problem: Problem) -> str | None:
        """A special token's text inside the problem's own: it would end the message in the middle of the question."""
        texts = [problem.question, problem.answer, problem.solution or ""]
        specials = [token for token in self.tokenizer.all_special_tokens if len(token) > 2]
        return next((token for token in specials if any(token in text for text in texts)), None)

    def round_trip_difference(self, problem: Problem) -> str | None:
        """None when decoding the prompt's ids gives its text again, else where the two part."""
        text = self.render_student(problem)
        decoded = self.tokenizer.decode(self.encode(text), skip_special_tokens=False)
        if text in decoded:
            return None
        at = next(
            (i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b), min(len(text), len(decoded))
        )
        return f"from character {at}: {text[at : at + 40]!r} became {decoded[at : at + 40]!r}"

    def _render_reference(self, problem: Problem, solution: str | None, cut: bool = False) -> str:
        context = self.config.privileged_context
        shown = solution if context != "answer" else None
        show_answer = context != "solution" or not shown or cut
        try:
            return self._privileged.render(
                question=problem.question,
                solution=shown or None,
                answer=problem.answer if show_answer else None,
                reference_begin=self.config.reference_begin,
                reference_end=self.config.reference_end,
            )
        except _NothingToShow as error:
            raise DataError(
                f"{problem.id}: data.prompts.privileged shows `solution` or `answer`, and this problem has none to "
                "show; write {{ solution or answer }}, or put it inside {% if solution %}"
            ) from error

    def _try_templates(self) -> None:
        """Raise DataError for templates that parse but fail when they are rendered, with a solution or without."""
        for solution in (None, "solution"):
            try:
                self.render_student(Problem("probe", "probe", "question", "answer", solution))
                with suppress(DataError):  # a template may need what every problem of the run has
                    self.render_privileged(Problem("probe", "probe", "question", "answer", solution))
            except jinja2.TemplateError as error:
                raise DataError(f"a prompt template cannot be rendered: {error}") from error

    def _shortened(self, solution: str, excess: int) -> str:
        """The solution without at least `excess` of its last tokens (or of its characters, where those are fewer)."""
        ids = self.tokenizer.encode(solution, add_special_tokens=False)
        kept = self.tokenizer.decode(ids[: max(0, len(ids) - excess - 4)], skip_special_tokens=True)
        return kept.rstrip("\N{REPLACEMENT CHARACTER}").rstrip()

    def _most_tokens(self, text: str) -> int:
        """No fewer than the tokens of a message: one per byte, with the chat template, a space and a first token."""
        return len(text.encode()) + self._overhead

    def _wrap(self, text: str) -> str:
        if not self.config.chat:
            return text
        messages = [{"role": "system", "content": self.config.system}] if self.config.system else []
        messages.append({"role": "user", "content": text})
        return self.tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            messages, tokenize=False, add_generation_prompt=True, **self.config.chat_template_kwargs
        )


def _environment() -> jinja2.Environment:
    return jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, autoescape=False, finalize=_shown
    )


class _NothingToShow(jinja2.TemplateRuntimeError):
    """A template shows a variable that this problem has no value for."""


def _shown(value: Any) -> Any:
    """Without this, a problem without a solution would get the word None into its prompt."""
    if value is None:
        raise _NothingToShow("a variable without a value")
    return value
