"""Answers of a reward service: a finite number, or a reason in one line why there is none."""

from __future__ import annotations

import json
import math

from fuzzing import fuzzed
from hypothesis import given
from hypothesis import strategies as st

from megatron_hdpo.rewards.service_answers import NoValue, value_of
from megatron_hdpo.rewards.service_messages import AnswerError, read_answer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.fixed_dictionaries({}, optional={"reward": JSON, "feedback": JSON, "score": JSON})
BODIES = st.binary(max_size=80) | OBJECTS.map(lambda value: json.dumps(value).encode()) | st.just(b"[" * 100_000)


@fuzzed
@given(body=BODIES)
def test_an_answer_is_a_number_or_a_reason(body: bytes) -> None:
    try:
        answer = read_answer(body)
    except AnswerError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        return
    said = json.loads(body)
    assert type(said["reward"]) in (int, float) and answer.reward == float(said["reward"])
    assert math.isfinite(answer.reward) and (answer.feedback or "") == (said.get("feedback") or "")


@fuzzed
@given(status=st.integers(100, 599), after=st.text(max_size=12) | st.floats().map(str), body=BODIES)
def test_any_status_brings_a_value_or_says_whether_another_request_may(status: int, after: str, body: bytes) -> None:
    try:
        value_of(status, {"Retry-After": after}, body)
    except NoValue as error:
        assert math.isfinite(error.wait_s) and error.wait_s >= 0
        assert error.may_pass == (status in (408, 429) or status >= 500)
        assert not (error.is_busy and error.is_outage)
    else:
        assert status == 200
