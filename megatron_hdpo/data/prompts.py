"""Prompts as token ids: the student's prompt, and the privileged ones.

`privileged` shows the ground truth. `hinted` shows the result of rollouts: a sibling's response (right and wrong ones
in the same words) or the task's feedback on an attempt.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import jinja2
import numpy as np

from megatron_hdpo.data.chat_template import ChatTemplate
from megatron_hdpo.data.control_texts import ControlTexts
from megatron_hdpo.data.plain_text import PlainText, unmarked, without_marks_of_its_own
from megatron_hdpo.data.prompt_config import PromptConfig
from megatron_hdpo.data.templates import NothingToShow, environment, rendered
from megatron_hdpo.data.text_tokens import TextEncoder, TokenizerLike
from megatron_hdpo.data.trial import check_size, trial
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.problem import Problem


class PromptTooLong(DataError):
    """A prompt over max_prompt_tokens that cannot be shortened without cutting its problem."""


class NoGroundTruthError(DataError):
    """A problem that lacks what the privileged template shows."""


@dataclass(frozen=True)
class Hint:
    """The content of a privileged prompt in place of the ground truth.

    attempt: text of a response to the problem. answer: that response's own final answer, right or wrong. feedback: the
    task's text about an attempt. An empty text is not shown.
    """

    attempt: str = ""
    answer: str = ""
    feedback: str = ""


@dataclass(frozen=True)
class HintedPrompt:
    """Prompt with a hint. ids: int32 [P]. lost: tokens of the whole prompt that did not fit; 0 if nothing was cut."""

    ids: np.ndarray
    lost: int = 0


class PromptBuilder:
    """Renderer and encoder of prompts with one tokenizer. Stateless after construction.

    vocab_size: rows of the model's embedding; None where no model is known. Raises DataError when the tokenizer lacks a
    chat template that the recipe asks for, or a template cannot be rendered or loses the question.
    """

    def __init__(self, tokenizer: TokenizerLike, config: PromptConfig, vocab_size: int | None = None) -> None:
        if config.chat and not getattr(tokenizer, "chat_template", None):
            raise DataError("data.prompts.chat is true, but the tokenizer has no chat template; set it to false")
        self.tokenizer, self.config = tokenizer, config
        templates = environment()
        self._student = templates.from_string(config.student)
        self._privileged = templates.from_string(config.privileged)
        self._hint = templates.from_string(config.hint)
        self._control = ControlTexts(tokenizer)
        self._plain = PlainText(tokenizer, self._control)
        self._encoder = TextEncoder(tokenizer, self._plain, vocab_size)
        template = partial(ChatTemplate, tokenizer, config.system, date=config.date)
        self._chat = template(config.chat_template_kwargs) if config.chat else None
        self._teachers_chat = self._chat
        if config.chat and config.privileged_chat_template_kwargs:
            variables = config.chat_template_kwargs | config.privileged_chat_template_kwargs
            self._teachers_chat = template(variables, key="privileged_chat_template_kwargs")
        self._overhead = max(len(wrap("").encode()) for wrap in (self._wrap, self._wrap_for_teacher)) + 2
        with trial():
            self._try_templates()

    def notes(self) -> list[str]:
        """Return what the user should know of the prompts."""
        chats = [chat for chat in (self._chat, self._teachers_chat) if chat is not None]
        return list(dict.fromkeys(note for chat in chats for note in chat.notes()))

    @property
    def markers(self) -> tuple[str, str]:
        """Return the reference markers: a response that quotes them has leaked its prompt."""
        return self.config.reference_begin, self.config.reference_end

    def render_student(self, problem: Problem) -> str:
        """Return the text of the student's prompt, chat template included."""
        return unmarked(self._student_text(problem))

    def render_privileged(self, problem: Problem, solution: str | None = None) -> str:
        """Return the text of the privileged prompt, chat template included; `solution` replaces the problem's own."""
        return unmarked(self._privileged_text(problem, problem.solution if solution is None else solution))

    def render_hinted(self, problem: Problem, hint: Hint) -> str:
        """Return the text of the prompt with a hint, chat template included."""
        return unmarked(self._hinted_text(problem, hint))

    def student(self, problem: Problem) -> np.ndarray:
        """Return the ids int32 [P] of the student's prompt.

        Raises PromptTooLong beyond max_prompt_tokens, DataError for text that the tokenizer cannot express.
        """
        ids = self._encoded(self._student_text(problem))
        if len(ids) > self.config.max_prompt_tokens:
            limit = self.config.max_prompt_tokens
            raise PromptTooLong(f"{problem.id}: the prompt has {len(ids)} tokens, max_prompt_tokens is {limit}")
        return ids

    def privileged_prompt(self, problem: Problem) -> np.ndarray:
        """Return the ids int32 [P] of the privileged prompt.

        A solution that does not fit is cut at its end, and the answer is then shown in addition. Raises PromptTooLong
        when even the answer alone does not fit.
        """
        ids = self._encoded(self._privileged_text(problem, problem.solution))
        limit, solution = self.config.privileged_limit, problem.solution
        while len(ids) > limit and solution:
            solution = self._shortened(solution, len(ids) - limit, "beginning")
            ids = self._encoded(self._privileged_text(problem, solution, cut=True))
        if len(ids) > limit:
            raise PromptTooLong(
                f"{problem.id}: the privileged prompt has {len(ids)} tokens without any solution, "
                f"the limit is {limit}; raise max_privileged_tokens"
            )
        return ids

    def hinted(self, problem: Problem, hint: Hint) -> np.ndarray:
        """Return the ids int32 [P] of `hinted_prompt`."""
        return self.hinted_prompt(problem, hint).ids

    def hinted_prompt(self, problem: Problem, hint: Hint) -> HintedPrompt:
        """Return the prompt with a hint, and how much of the hint did not fit.

        A hint that does not fit is cut, the problem never: first the attempt (`hint_keep` says which part stays), then
        the feedback (its beginning stays), then the answer. Texts of control tokens in it are ordinary characters; a
        tokenizer that cannot read them so gets the hint without them. Raises PromptTooLong when not even the problem
        fits.
        """
        limit = self.config.privileged_limit
        hint = Hint(*map(self._encodable, (hint.attempt, hint.answer, hint.feedback)))
        ids = self._encoded(self._hinted_text(problem, hint))
        whole = len(ids)
        for part, keep in (("attempt", self.config.hint_keep), ("feedback", "beginning"), ("answer", "beginning")):
            while len(ids) > limit and (text := getattr(hint, part)):
                hint = replace(hint, **{part: self._shortened(text, len(ids) - limit, keep)})
                ids = self._encoded(self._hinted_text(problem, hint))
        if len(ids) > limit:
            raise PromptTooLong(
                f"{problem.id}: the prompt for hints has {len(ids)} tokens without any hint, the limit is {limit}; "
                "raise max_privileged_tokens"
            )
        return HintedPrompt(ids, whole - len(ids))

    def check_length(self, problem: Problem, privileged: bool, hints: bool = False) -> bool:
        """Raise PromptTooLong where a prompt that is asked for would; return whether no solution has to be cut.

        Asked for are `student`, with `privileged` also `privileged_prompt`, with `hints` also `hinted`.
        Byte-level tokenizers give at most one token per byte: what is short enough in bytes is not encoded.
        """
        if self._most_tokens(self._render_question(problem)) > self.config.max_prompt_tokens:
            self.student(problem)
        limit, whole = self.config.privileged_limit, True
        if privileged and self._most_tokens(text := self._render_reference(problem, problem.solution)) > limit:
            whole = len(self._encoded(self._wrap_for_teacher(text))) <= limit
            if not whole:
                self.privileged_prompt(problem)
        if hints and self._most_tokens(self._render_hint(problem, Hint())) > limit:
            self.hinted(problem, Hint())
        return whole

    @property
    def may_lack_tokens(self) -> bool:
        """Return whether some text may have no token, or one that the model does not have."""
        return self._encoder.may_lack_tokens

    @property
    def vocab_size(self) -> int | None:
        """Return the number of rows of the model's embedding, where some tokens have none; else None."""
        return self._encoder.vocab_size

    def data_ids(self, text: str) -> list[int]:
        """Return the ids of a text of data alone, such as a solution, without any control token."""
        return self._plain.ids_of_data(text)

    def _encoded(self, text: str) -> np.ndarray:
        """Return the ids int32 [P] of rendered text, in which control tokens of data are marked.

        A chat template has its own special tokens; raw text gets the tokenizer's, without an end of sequence. Raises
        DataError for text that the tokenizer has no tokens for.
        """
        ids = self._encoder.encode(text, add_special_tokens=not self.config.chat)
        ends = not self.config.chat and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id
        return ids[:-1] if ends else ids

    def control_token(self, problem: Problem) -> str | None:
        """Return the text of a control token in the problem, None without one."""
        return next(filter(None, map(self._control.first, _texts(problem))), None)

    def can_encode(self, problem: Problem) -> bool:
        """Return whether the problem's texts can be read without any control token, which would end the message."""
        return all(map(self._plain.can_encode, _texts(problem)))

    def _student_text(self, problem: Problem) -> str:
        return self._wrap(self._render_question(problem))

    def _privileged_text(self, problem: Problem, solution: str | None, cut: bool = False) -> str:
        return self._wrap_for_teacher(self._render_reference(problem, solution, cut))

    def _hinted_text(self, problem: Problem, hint: Hint) -> str:
        return self._wrap_for_teacher(self._render_hint(problem, hint))

    def _encodable(self, text: str) -> str:
        text = without_marks_of_its_own(text)
        return text if self._plain.can_encode(text) else self._control.removed(text)

    def _render_question(self, problem: Problem) -> str:
        return rendered(
            self._student, f"{problem.id}: data.prompts.student", question=self._plain.marked(problem.question)
        )

    def _render_reference(self, problem: Problem, solution: str | None, cut: bool = False) -> str:
        context = self.config.privileged_context
        shown = solution if context != "answer" else None
        show_answer = context != "solution" or not shown or cut
        try:
            return rendered(
                self._privileged,
                f"{problem.id}: data.prompts.privileged",
                question=self._plain.marked(problem.question),
                solution=self._plain.marked(shown) if shown else None,
                answer=self._plain.marked(problem.answer) if show_answer else None,
                reference_begin=self.config.reference_begin,
                reference_end=self.config.reference_end,
            )
        except NothingToShow as error:
            raise NoGroundTruthError(
                f"{problem.id}: data.prompts.privileged shows `solution` or `answer`, and this problem has none to "
                "show; write {{ solution or answer }}, or put it inside {% if solution %}"
            ) from error

    def _render_hint(self, problem: Problem, hint: Hint) -> str:
        return rendered(
            self._hint,
            f"{problem.id}: data.prompts.hint",
            question=self._plain.marked(problem.question),
            attempt=self._plain.marked(hint.attempt),
            answer=self._plain.marked(hint.answer),
            feedback=self._plain.marked(hint.feedback),
            reference_begin=self.config.reference_begin,
            reference_end=self.config.reference_end,
        )

    def _try_templates(self) -> None:
        """Raise DataError for templates that parse but fail when they are rendered, with a solution or without."""
        question = "seventeen and twenty five"
        for solution in (None, "solution"):
            problem = Problem("a first try", "probe", question, "answer", solution)
            prompts = {
                "student": self.render_student(problem),
                "hint": self.render_hinted(problem, Hint(solution or "")),
            }
            with suppress(NoGroundTruthError):  # a template may need what every problem of the run has
                prompts["privileged"] = self.render_privileged(problem)
            for name, text in prompts.items():
                self._check_prompt(name, question, text)

    def _check_prompt(self, name: str, question: str, text: str) -> None:
        try:
            check_size(text)
        except jinja2.TemplateError as error:
            raise DataError(f"data.prompts.{name}: the template cannot be used: {error}") from error
        if question not in text.casefold():
            raise DataError(f"data.prompts.{name}: the question is missing in what the template makes: {text[:200]!r}")

    def _shortened(self, text: str, excess: int, keep: str) -> str:
        """Return the beginning or the end of a text, shorter by at least `excess` tokens.

        A text of no more than `excess` + 4 tokens becomes empty.
        """
        ids = self.data_ids(text)
        size = max(0, len(ids) - excess - 4)
        kept = self.tokenizer.decode(
            ids[:size] if keep == "beginning" else ids[len(ids) - size :], skip_special_tokens=True
        )
        return kept.strip("\N{REPLACEMENT CHARACTER}").strip()

    def _most_tokens(self, text: str) -> int:
        """Return an upper bound of a message's tokens: one per byte, chat template and first token included."""
        return len(text.encode()) + self._overhead

    def _wrap(self, text: str) -> str:
        return self._chat.wrap(text) if self._chat else text

    def _wrap_for_teacher(self, text: str) -> str:
        return self._teachers_chat.wrap(text) if self._teachers_chat else text


def _texts(problem: Problem) -> tuple[str, str, str]:
    return problem.question, problem.answer, problem.solution or ""
