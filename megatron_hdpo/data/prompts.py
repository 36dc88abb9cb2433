"""Prompts as token ids: the student's prompt, and the privileged ones.

`privileged` shows the ground truth. `hinted` shows the result of rollouts: a sibling's response (right and wrong ones
in the same words) or the task's feedback on an attempt.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jinja2
import numpy as np

from megatron_hdpo.data.prompt_config import PromptConfig
from megatron_hdpo.data.templates import NothingToShow, environment
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.problem import Problem


class PromptTooLong(DataError):
    """A prompt over max_prompt_tokens that cannot be shortened without cutting its problem."""


class NoTokenForText(DataError):
    """A prompt with characters that the tokenizer has no token for."""


class TokenizerLike(Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    eos_token_id: int | None
    unk_token_id: int | None
    all_special_tokens: Sequence[str]

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = ...) -> str: ...


@dataclass(frozen=True)
class Hint:
    """The content of a privileged prompt in place of the ground truth.

    attempt: text of a response to the problem. answer: that response's own final answer, right or wrong. feedback: the
    task's text about an attempt. An empty text is not shown.
    """

    attempt: str = ""
    answer: str = ""
    feedback: str = ""


class PromptBuilder:
    """Renderer and encoder of prompts with one tokenizer. Stateless after construction.

    Raises DataError when the tokenizer lacks a chat template that the recipe asks for, or a template cannot be
    rendered.
    """

    def __init__(self, tokenizer: TokenizerLike, config: PromptConfig) -> None:
        if config.chat and not getattr(tokenizer, "chat_template", None):
            raise DataError("data.prompts.chat is true, but the tokenizer has no chat template; set it to false")
        self.tokenizer, self.config = tokenizer, config
        templates = environment()
        self._student = templates.from_string(config.student)
        self._privileged = templates.from_string(config.privileged)
        self._hint = templates.from_string(config.hint)
        self._special_texts = [token for token in tokenizer.all_special_tokens if len(token) > 2]
        self._overhead = len(self._wrap("").encode()) + 2
        self._try_templates()

    @property
    def markers(self) -> tuple[str, str]:
        """Return the reference markers: a response that quotes them has leaked its prompt."""
        return self.config.reference_begin, self.config.reference_end

    def render_student(self, problem: Problem) -> str:
        """Return the text of the student's prompt, chat template included."""
        return self._wrap(self._student.render(question=problem.question))

    def render_privileged(self, problem: Problem, solution: str | None = None) -> str:
        """Return the text of the privileged prompt, chat template included; `solution` replaces the problem's own."""
        return self._wrap(self._render_reference(problem, problem.solution if solution is None else solution))

    def render_hinted(self, problem: Problem, hint: Hint) -> str:
        """Return the text of the prompt with a hint, chat template included."""
        return self._wrap(self._render_hint(problem, hint))

    def student(self, problem: Problem) -> np.ndarray:
        """Return the ids int32 [P] of the student's prompt.

        Raises PromptTooLong beyond max_prompt_tokens, DataError for text that the tokenizer cannot express.
        """
        ids = self.encode(self.render_student(problem))
        if len(ids) > self.config.max_prompt_tokens:
            limit = self.config.max_prompt_tokens
            raise PromptTooLong(f"{problem.id}: the prompt has {len(ids)} tokens, max_prompt_tokens is {limit}")
        return ids

    def privileged_prompt(self, problem: Problem) -> np.ndarray:
        """Return the ids int32 [P] of the privileged prompt.

        A solution that does not fit is cut at its end, and the answer is then shown in addition. Raises PromptTooLong
        when even the answer alone does not fit.
        """
        ids = self.encode(self.render_privileged(problem))
        limit, solution = self.config.privileged_limit, problem.solution
        while len(ids) > limit and solution:
            solution = self._shortened(solution, len(ids) - limit, "beginning")
            ids = self.encode(self._wrap(self._render_reference(problem, solution, cut=True)))
        if len(ids) > limit:
            raise PromptTooLong(
                f"{problem.id}: the privileged prompt has {len(ids)} tokens without any solution, "
                f"the limit is {limit}; raise max_privileged_tokens"
            )
        return ids

    def hinted(self, problem: Problem, hint: Hint) -> np.ndarray:
        """Return the ids int32 [P] of the prompt with a hint.

        A hint that does not fit is cut, the problem never: first the attempt (`hint_keep` says which part stays), then
        the feedback (its beginning stays), then the answer. Texts of special tokens are removed from the hint. Raises
        PromptTooLong when not even the problem fits.
        """
        limit = self.config.privileged_limit
        hint = Hint(*(self._without_special_tokens(text) for text in (hint.attempt, hint.answer, hint.feedback)))
        ids = self.encode(self.render_hinted(problem, hint))
        for part, keep in (("attempt", self.config.hint_keep), ("feedback", "beginning"), ("answer", "beginning")):
            while len(ids) > limit and (text := getattr(hint, part)):
                hint = replace(hint, **{part: self._shortened(text, len(ids) - limit, keep)})
                ids = self.encode(self.render_hinted(problem, hint))
        if len(ids) > limit:
            raise PromptTooLong(
                f"{problem.id}: the prompt for hints has {len(ids)} tokens without any hint, the limit is {limit}; "
                "raise max_privileged_tokens"
            )
        return ids

    def check_length(self, problem: Problem, privileged: bool, hints: bool = False) -> None:
        """Raise PromptTooLong where `student`, with `privileged` also `privileged`, or with `hints` `hinted` would.

        Byte-level tokenizers give at most one token per byte: what is short enough in bytes is not encoded.
        """
        if self._most_tokens(self._student.render(question=problem.question)) > self.config.max_prompt_tokens:
            self.student(problem)
        limit = self.config.privileged_limit
        if privileged and self._most_tokens(self._render_reference(problem, problem.solution)) > limit:
            self.privileged_prompt(problem)
        if hints and self._most_tokens(self._render_hint(problem, Hint())) > limit:
            self.hinted(problem, Hint())

    @property
    def may_lack_tokens(self) -> bool:
        """Return whether the tokenizer may have no token for some characters."""
        return self.tokenizer.unk_token_id is not None

    def encode(self, text: str) -> np.ndarray:
        """Return the ids int32 [P] of rendered text.

        A chat template has its own special tokens; raw text gets the tokenizer's, without an end of sequence. Raises
        DataError for text that the tokenizer has no tokens for.
        """
        ids = list(self.tokenizer.encode(text, add_special_tokens=not self.config.chat))
        if not self.config.chat and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids and self.tokenizer.decode([unknown]) not in text:
            raise NoTokenForText(f"the tokenizer has no token for some characters of this prompt: {text[:200]!r}")
        return np.asarray(ids, dtype=np.int32)

    def foreign_special_token(self, problem: Problem) -> str | None:
        """Return a special token's text found in the problem, where it would end the message early; else None."""
        texts = [problem.question, problem.answer, problem.solution or ""]
        return next((token for token in self._special_texts if any(token in text for text in texts)), None)

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
        except NothingToShow as error:
            raise DataError(
                f"{problem.id}: data.prompts.privileged shows `solution` or `answer`, and this problem has none to "
                "show; write {{ solution or answer }}, or put it inside {% if solution %}"
            ) from error

    def _render_hint(self, problem: Problem, hint: Hint) -> str:
        return self._hint.render(
            question=problem.question,
            attempt=hint.attempt,
            answer=hint.answer,
            feedback=hint.feedback,
            reference_begin=self.config.reference_begin,
            reference_end=self.config.reference_end,
        )

    def _without_special_tokens(self, text: str) -> str:
        """Return the text without texts of special tokens.

        A sibling may have spelled such a text with ordinary tokens; encoded again, it would become the special token.
        """
        while found := next((token for token in self._special_texts if token in text), None):
            text = text.replace(found, "")
        return text

    def _try_templates(self) -> None:
        """Raise DataError for templates that parse but fail when they are rendered, with a solution or without."""
        for solution in (None, "solution"):
            try:
                self.render_student(Problem("probe", "probe", "question", "answer", solution))
                self.render_hinted(Problem("probe", "probe", "question", "answer"), Hint(solution or ""))
                with suppress(DataError):  # a template may need what every problem of the run has
                    self.render_privileged(Problem("probe", "probe", "question", "answer", solution))
            except jinja2.TemplateError as error:
                raise DataError(f"a prompt template cannot be rendered: {error}") from error

    def _shortened(self, text: str, excess: int, keep: str) -> str:
        """Return the beginning or the end of a text, shorter by at least `excess` tokens.

        A text of no more than `excess` + 4 tokens becomes empty.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        size = max(0, len(ids) - excess - 4)
        kept = self.tokenizer.decode(
            ids[:size] if keep == "beginning" else ids[len(ids) - size :], skip_special_tokens=True
        )
        return kept.strip("\N{REPLACEMENT CHARACTER}").strip()

    def _most_tokens(self, text: str) -> int:
        """Return an upper bound of a message's tokens: one per byte, chat template and first token included."""
        return len(text.encode()) + self._overhead

    def _wrap(self, text: str) -> str:
        if not self.config.chat:
            return text
        messages = [{"role": "system", "content": self.config.system}] if self.config.system else []
        messages.append({"role": "user", "content": text})
        return self.tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            messages, tokenize=False, add_generation_prompt=True, **self.config.chat_template_kwargs
        )
