"""What is sent to a reward service, and how its answer is read."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import orjson

from megatron_hdpo.types.problem import Problem

LONGEST_ANSWER = 1 << 20
"""Bytes of an answer that are read, at most."""
_SHOWN = 200


class Answer(NamedTuple):
    """The value that a service gave to a response, and its feedback, None without any."""

    reward: float
    feedback: str | None


class AnswerError(ValueError):
    """An answer without a value that can be used; the text says why."""


def request_body(problem: Problem, response: str, sample: str) -> bytes:
    """Return the request for the value of a response.

    sample: unique for each response, and the same in all requests for it. Metadata that JSON cannot hold is left out.
    """
    return orjson.dumps(
        {
            "id": problem.id,
            "sample": sample,
            "task": problem.task,
            "question": problem.question,
            "answer": problem.answer,
            "response": response,
            "metadata": {key: value for key, value in problem.metadata.items() if _is_json(value)},
        }
    )


def read_answer(body: bytes) -> Answer:
    """Return the value and the feedback in the body of an answer. Raises AnswerError when it holds no number.

    Only a finite JSON number is a value: text such as "1" and true are none, and what is missing is never 0.
    """
    if len(body) > LONGEST_ANSWER:
        raise AnswerError(f"the answer is longer than {LONGEST_ANSWER} bytes")
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise AnswerError(f"the answer is not JSON ({error}): {shown(body)}") from error
    if not isinstance(said, dict) or "reward" not in said:
        raise AnswerError(f'the answer is no object with a "reward": {shown(body)}')
    reward, feedback = said["reward"], said.get("feedback")
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise AnswerError(f"its reward is no finite number: {shown(body)}")
    if not (feedback is None or isinstance(feedback, str)):
        raise AnswerError(f"its feedback is neither text nor null: {shown(body)}")
    return Answer(float(reward), feedback or None)


def shown(body: bytes) -> str:
    """Return the beginning of an answer on one line, for a message."""
    text = " ".join(body[: 4 * _SHOWN].decode("utf-8", "replace").split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def _is_json(value: Any) -> bool:
    try:
        orjson.dumps(value)
    except TypeError:
        return False
    return True
