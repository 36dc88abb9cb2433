"""Templates of prompts: Jinja2, rendered in a sandbox, their variables checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox

from megatron_hdpo.data.trial import TrialFailed, check_powers
from megatron_hdpo.types.errors import DataError

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

DEFAULT_HINT = (
    """{{ question }}

{% if attempt %}{{ reference_begin }}
{{ attempt }}
{% if answer %}Final answer: {{ answer }}
{% endif %}{{ reference_end }}

{% endif %}{% if feedback %}An earlier attempt at this problem was rejected. What was said of it:
{{ feedback }}

{% endif %}"""
    "What stands above besides the problem is for your eyes only. Understand what follows from it, then write your own "
    "complete solution to the problem without mentioning it. Reason step by step, and put your final answer within "
    "\\boxed{}."
)

STUDENT_VARIABLES = frozenset({"question"})
PRIVILEGED_VARIABLES = frozenset({"question", "answer", "solution", "reference_begin", "reference_end"})
HINT_VARIABLES = frozenset({"question", "attempt", "answer", "feedback", "reference_begin", "reference_end"})
TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2")
TEXT_SUFFIXES = (*TEMPLATE_SUFFIXES, ".txt", ".text", ".md", ".markdown", ".rst", ".prompt", ".tmpl")


class NothingToShow(jinja2.TemplateRuntimeError):
    """A template uses a variable for which this problem has no value."""


def names_a_file(text: str) -> bool:
    """Return whether a prompt text of a recipe is the path of a file.

    A single word with the suffix of a text file is one, and a line with the suffix of a template.
    """
    if "\n" in text:
        return False
    return text.endswith(TEMPLATE_SUFFIXES) or (len(text.split()) == 1 and text.lower().endswith(TEXT_SUFFIXES))


def read_template(template: str) -> str:
    """Return the template itself, or the text of the file that it names, relative to the current folder.

    Raises ValueError for a file that cannot be read or is empty.
    """
    if not names_a_file(template):
        return template
    try:
        text = Path(template).read_text(encoding="utf-8")
    except OSError as error:
        reason = f"{error.strerror} (relative to {Path.cwd()})"
        raise ValueError(f"cannot read the file {template}: {reason}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the file {template} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"the file {template} is empty")
    return text


def variables_of(template: str) -> frozenset[str]:
    """Return the variables that a template uses. Raises ValueError when it does not parse."""
    try:
        tree = environment().parse(template)
        check_powers(tree)
        environment().from_string(template)  # some errors of a template show when it is compiled
        return frozenset(jinja2.meta.find_undeclared_variables(tree))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the template does not parse: {error.message} (its line {error.lineno})") from error
    except TrialFailed as error:
        raise ValueError(f"the template cannot be used: {error}") from error
    except (SyntaxError, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"the template is nested too deep: {error}") from error


def rendered(template: jinja2.Template, name: str, **values: Any) -> str:
    """Return what a template makes of these values. Raises NothingToShow, and DataError for all else that fails."""
    try:
        return template.render(**values)
    except NothingToShow:
        raise
    except Exception as error:  # a template is a program: it may raise whatever Python does
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{name}: the template cannot be rendered: {reason}") from error


def check_template(template: str, variables: frozenset[str]) -> str:
    """Return the template. Raises ValueError when it does not parse, uses other variables or omits the question."""
    used = variables_of(template)
    if unknown := used - variables:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"the template uses unknown variables: {names}; it may use: {', '.join(sorted(variables))}")
    if "question" not in used:
        raise ValueError("the template does not use the variable question, so every prompt would be the same")
    return template


def environment() -> jinja2.Environment:
    """Return the environment that compiles templates: sandboxed, strict about undefined names, without escaping."""
    return jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, autoescape=False, finalize=_shown
    )


def _shown(value: Any) -> Any:
    """Return the value to render, or raise: a problem without a solution must not get the word None into its prompt."""
    if value is None:
        raise NothingToShow("a variable without a value")
    return value
