"""Exact match after a harmless normalisation, for answers that are words, codes or multiple-choice letters."""

from __future__ import annotations

import re
import unicodedata

from megatron_hdpo.rewards.around import bare
from megatron_hdpo.rewards.extraction import AnswerFormat, extract_answer

_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")


def normalise(answer: str) -> str:
    r"""Return the text in NFKC and lower case.

    Without `\text{}` around words, what stands around the whole (`around`), extra spaces and a final full stop.
    """
    text = _TEXT_COMMAND.sub(r"\1", unicodedata.normalize("NFKC", answer))
    return " ".join(bare(text).casefold().split())


def score_exact(gold: str, response: str, answer_format: AnswerFormat = "boxed") -> float:
    """Return 1.0 when the final answer of `response` equals `gold` after `normalise`, else 0.0."""
    answer = extract_answer(response, answer_format)
    if answer is None:
        return 0.0
    return float(normalise(answer.text) == normalise(gold) != "")
