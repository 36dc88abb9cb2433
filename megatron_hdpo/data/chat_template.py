"""The chat template of a tokenizer: a program of whoever published the model, so it is tried before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from megatron_hdpo.data.trial import check_powers, check_size, trial
from megatron_hdpo.types.errors import DataError

_OURS = frozenset({"messages", "add_generation_prompt"})
"""Variables of a chat template that every prompt sets itself."""
_CLOCK, _DATES = "strftime_now", "pinned_dates"
# transformers passes only plain data to a template, so a function of ours is written as a macro. It is a line of its
# own, whose end jinja takes away.
_CLOCK_MACRO = (
    "{% macro strftime_now(format) %}{% if format in pinned_dates %}{{ pinned_dates[format] }}{% else %}"
    "{{ raise_exception('it asks for the date in the format ' ~ format ~ ', which it computes: set the date by "
    "data.prompts.chat_template_kwargs') }}{% endif %}{% endmacro %}\n"
)
_PROBE = """Is \\frac{1}{2} < "3" & 4 > '2'?\nSay which of seventeen & twenty five."""
"""A question with the characters that templates for other texts would write in another way."""


class ChatTemplateError(DataError):
    """A chat template that cannot be used, or that loses what it is given."""


class ChatTemplate:
    """Messages as the text that a model expects.

    system: text of the system message, None for none. variables: more variables of the template. date: the day that a
    template gets when it asks for today's, ISO 8601, so that a run has the same prompts on every day. key: of the
    recipe that names the variables, for messages. Raises ChatTemplateError for a template that does not parse, does not
    read such a variable, fails, or leaves out the question or the system message.
    """

    def __init__(
        self,
        tokenizer: Any,
        system: str | None,
        variables: Mapping[str, Any],
        *,
        date: str,
        key: str = "chat_template_kwargs",
    ) -> None:
        self.tokenizer, self.system, self.variables = tokenizer, system, dict(variables)
        self.date, self._key = date, key
        tree = self._parsed()
        self._read = frozenset(jinja2.meta.find_undeclared_variables(tree))
        self._check_variables()
        self._source: str | None = None
        if _CLOCK in self._read:
            self._source = _CLOCK_MACRO + self.tokenizer.get_chat_template()
            self.variables[_DATES] = _in_every_format(tree, date)
        with trial():
            self._check_nothing_is_lost()

    def wrap(self, text: str) -> str:
        """Return the text as the user's message, after the system message, up to where the answer begins."""
        return self._rendered(text, self.system, self.variables)

    def notes(self) -> list[str]:
        """Return what the user should know of the template."""
        return [self._note_of_date()] if self._depends_on_the_date() else []

    def _rendered(self, text: str, system: str | None, variables: Mapping[str, Any]) -> str:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, chat_template=self._source, tokenize=False, add_generation_prompt=True, **variables
            )
        except Exception as error:  # a template may raise whatever Python does
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ChatTemplateError(f"the tokenizer's chat template cannot be rendered: {reason}") from error
        return str(rendered)

    def _parsed(self) -> jinja2.nodes.Template:
        """Return the template as jinja reads it. Raises ChatTemplateError for one that it cannot read."""
        try:
            tree = _environment().parse(self.tokenizer.get_chat_template())
            check_powers(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the tokenizer's chat template does not parse: {error.message} (its line {error.lineno})"
            ) from error
        except (ValueError, jinja2.TemplateError, RecursionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ChatTemplateError(f"the tokenizer's chat template cannot be used: {reason}") from error
        return tree

    def _check_variables(self) -> None:
        free = self._read - _OURS - {_CLOCK}
        if unknown := sorted(self.variables.keys() - free):
            raise ChatTemplateError(
                f"data.prompts.{self._key}: the tokenizer's chat template does not read {', '.join(unknown)}; it "
                f"reads: {', '.join(sorted(free)) or 'no variables'}"
            )

    def _check_nothing_is_lost(self) -> None:
        try:
            text = check_size(self.wrap(_PROBE))
        except ChatTemplateError as error:
            raise self._without_system_or(error) from error
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the tokenizer's chat template cannot be used: {error}") from error
        if not _has_the_words_of(_PROBE, text):
            raise ChatTemplateError(
                f"the tokenizer's chat template leaves out the question or changes it (of {_PROBE!r} it makes "
                f"{text[:200]!r}): it may want messages as lists of parts; set data.prompts.chat=false, or use another "
                "chat template"
            )
        if self.system and not _has_the_words_of(self.system, text):
            raise ChatTemplateError(
                "the tokenizer's chat template leaves out the system message: leave data.prompts.system out, and say "
                "it in data.prompts.student"
            )

    def _without_system_or(self, error: ChatTemplateError) -> ChatTemplateError:
        """Return a clearer error where the system message alone is the reason."""
        if self.system:
            try:
                self._rendered(_PROBE, None, self.variables)
            except ChatTemplateError:
                return error
            return ChatTemplateError(
                f"{error}: it takes no system message; leave data.prompts.system out, and say it in "
                "data.prompts.student"
            )
        return error

    def _depends_on_the_date(self) -> bool:
        if _CLOCK not in self._read:
            return False
        try:
            self._rendered(_PROBE, self.system, self.variables | {_DATES: {}})
        except ChatTemplateError:  # it asked for a date
            return True
        return False

    def _note_of_date(self) -> str:
        return (
            f"the tokenizer's chat template puts a date into every prompt: it gets {self.date} (data.prompts.date) on "
            "every day, so that a run has the same prompts when it is resumed"
        )


def _in_every_format(tree: jinja2.nodes.Template, date: str) -> dict[str, str]:
    """Return a day in every format of a template: each of its texts with a percent sign may be one."""
    texts = (node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str))
    return {text: datetime.fromisoformat(date).strftime(text) for text in texts if "%" in text}


def _has_the_words_of(message: str, text: str) -> bool:
    """Return whether all words of a message stand in a text in their order; templates may change the blanks between."""
    return " ".join(message.split()) in " ".join(text.split())


def _environment() -> jinja2.Environment:
    """Return an environment that parses what transformers parses."""
    return jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )


class _Generation(jinja2.ext.Extension):
    """The tag by which templates mark the assistant's text."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
