"""The bytes of an answer give the same arrays, whole or in pieces, wherever the network cuts them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hdpo.rollout.sglang.answers import Asked, BadAnswerError, parse_completion
from megatron_hdpo.rollout.sglang.reading import RawAnswer, Reading, read_answer
from megatron_hdpo.rollout.sglang.stamps import RunStamp
from megatron_hdpo.types.rollouts import Completion, SamplingParams

VOCAB, STOP, LONGEST = 17, 1, 12
STAMP = RunStamp("0123456789abcdef")
Rows = list[tuple[float, int]]
ROWS: Rows = [(-0.5, 4), (-1.25, 9), (-3.0, 5), (-0.125, STOP)]


def asked(limit: int = LONGEST) -> Asked:
    return Asked(SamplingParams(limit, stop_token_ids=(STOP,)), 3, VOCAB, STAMP)


def part(rows: Rows, total: int, finish: Any = None, version: int = 1, **meta: Any) -> bytes:
    """What SGLang sends of `rows`, when it has generated `total` tokens."""
    meta = {"finish_reason": finish, "weight_version": STAMP.of(version), "completion_tokens": total} | meta
    meta["output_token_logprobs"] = [[value, token, None] for value, token in rows]
    return orjson.dumps({"text": "", "output_ids": [token for _, token in rows], "meta_info": meta})


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def stream(rows: Rows, interval: int, finish: Any) -> list[bytes]:
    """The events of a streamed answer."""
    starts = range(0, len(rows), interval)
    return [
        event(part(rows[i : i + interval], min(i + interval, len(rows)), finish if i == starts[-1] else None))
        for i in starts
    ]


def raw(body: bytes, streamed: bool, ended: bool = True, size: int = 2**30) -> RawAnswer:
    """An answer that has arrived in pieces of `size` bytes."""
    answer = RawAnswer(streamed, ended=ended)
    for start in range(0, len(body), size):
        answer.add(body[start : start + size])
    assert answer.size == len(body)
    return answer


def check_bits(found: Completion | None, rows: Rows) -> None:
    assert found is not None
    assert found.token_ids.dtype == np.int32 and found.token_ids.tolist() == [token for _, token in rows]
    assert found.logprobs.tobytes() == np.array([value for value, _ in rows], dtype=np.float32).tobytes()
    assert found.weight_versions.tolist() == [1] * len(rows)


def finish_of(rows: Rows) -> Any:
    return {"type": "stop", "matched": STOP} if rows[-1][1] == STOP else {"type": "length", "length": len(rows)}


RESPONSES = st.builds(
    lambda rows, stops: [*rows, (-0.75, STOP)] if stops else rows,
    st.lists(st.tuples(st.floats(-100, 0), st.integers(2, VOCAB - 1)), min_size=1, max_size=LONGEST - 1),
    st.booleans(),
)


@given(RESPONSES, st.integers(1, LONGEST), st.integers(1, 400))
def test_whole_and_streamed_answers_are_the_same_to_the_bit(rows: Rows, interval: int, size: int) -> None:
    finish = finish_of(rows)
    whole = raw(part(rows, len(rows), finish), streamed=False, size=size)
    events = [*stream(rows, interval, finish), b"data: [DONE]\n\n"]
    for answer in (whole, raw(b"".join(events), streamed=True, size=size)):
        reading = read_answer(answer, asked(len(rows)))
        assert reading.ending == "complete" and reading.problem == ""
        assert reading.completion is not None and reading.completion.finish_reason == finish["type"]
        check_bits(reading.completion, rows)


@given(RESPONSES, st.integers(1, LONGEST), st.floats(0, 1), st.sampled_from(["cut", "aborted", "error"]))
def test_an_answer_that_ends_early_leaves_its_whole_pieces(rows: Rows, interval: int, at: float, how: str) -> None:
    events = stream(rows, interval, None)
    body = b"".join(events)
    end = round(at * len(body))
    arrived = sum(len(b"".join(events[: i + 1])) <= end for i in range(len(events)))
    kept = rows[: arrived * interval]
    body = body[:end] if how == "cut" else b"".join(events[:arrived])
    if how == "aborted":  # its last token is repeated, with the log-probs of all
        last = orjson.loads(part(kept, len(kept), {"type": "abort", "message": "no"}))
        body += event(orjson.dumps(last | {"output_ids": last["output_ids"][-1:]}))
    elif how == "error":
        body += event(orjson.dumps({"error": {"message": "no room", "code": 503}}))
    reading = read_answer(raw(body, streamed=True, ended=how != "cut"), asked())
    assert reading.ending == how and reading.tokens == len(kept)
    assert reading.status == (503 if how == "error" else None)
    if kept:
        check_bits(reading.completion, kept)
    else:
        assert reading.completion is None


def test_a_stream_that_ends_without_its_last_piece_says_so() -> None:
    reading = read_answer(raw(b"".join(stream(ROWS[:2], 1, None)), streamed=True), asked())
    assert (reading.ending, reading.problem, reading.status) == ("error", "the answer ended early", None)
    check_bits(reading.completion, ROWS[:2])


def test_a_piece_that_cannot_be_read_does_not_spoil_those_before_it() -> None:
    broken = event(b"{")
    body = b"".join(stream(ROWS[:2], 1, None)) + broken
    ended, cut = (read_answer(raw(body, True, ended), asked()) for ended in (True, False))
    assert ended.ending == "error" and ended.problem == "the answer is not JSON: b'{'" and ended.status == 500
    assert cut.ending == "cut"
    for reading in (ended, cut):
        check_bits(reading.completion, ROWS[:2])


def test_an_answer_that_is_not_streamed_is_aborted_with_its_tokens_or_cut_without() -> None:
    body = part(ROWS[:3], 3, {"type": "abort", "message": "paused"})
    aborted = read_answer(raw(body, streamed=False), asked())
    assert (aborted.ending, aborted.problem, aborted.tokens) == ("aborted", "paused", 3)
    check_bits(aborted.completion, ROWS[:3])
    cut = read_answer(raw(body[:-9], streamed=False, ended=False), asked())
    assert cut == Reading("cut")


FALSE = {
    "shorter": part(ROWS[:3], 3, {"type": "length"}),
    "of no reason": part(ROWS, 4, {"type": "bored"}),
    "log-probs of others": orjson.dumps(orjson.loads(part(ROWS, 4, finish_of(ROWS))) | {"output_ids": [4, 9, 6, 1]}),
    "beyond the vocabulary": part([(-1.0, VOCAB), (-1.0, STOP)], 2, finish_of(ROWS)),
    "not finite": part([(float("nan"), 4), (-1.0, STOP)], 2, finish_of(ROWS)),
    "positive": part([(3.0, 4), (-1.0, STOP)], 2, finish_of(ROWS)),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", list(FALSE))
def test_a_false_answer_has_the_words_of_its_check_and_no_number(name: str, streamed: bool) -> None:
    answer = orjson.loads(FALSE[name])
    with pytest.raises(BadAnswerError) as caught:
        parse_completion(answer, asked().sampling, VOCAB, STAMP)
    reading = read_answer(raw(event(FALSE[name]) if streamed else FALSE[name], streamed), asked())
    assert reading.ending == "false" and reading.completion is None
    assert reading.tokens == len(answer["output_ids"])
    assert reading.problem == str(caught.value)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("body", "words", "status"),
    [
        (b"oops", "the answer is not JSON: b'oops'", 500),
        (b"[]", "the answer is no completion: []", 500),
        (b'{"error": {"code": 400}}', "the answer is no completion: {'error': {'code': 400}}", 400),
        (b'{"meta_info": 3}', "the answer is no completion: {'meta_info': 3}", 500),
    ],
)
def test_what_is_no_completion_is_an_error(body: bytes, words: str, status: int, streamed: bool) -> None:
    reading = read_answer(raw(event(body) if streamed else body, streamed), asked())
    assert reading == Reading("error", problem=words, status=status)


def test_fields_of_other_types_never_raise() -> None:
    good = orjson.loads(part(ROWS, 4, finish_of(ROWS)))
    for value in (None, 3, "x", [], {}, [None], [[]]):
        spoilt = [good | {"output_ids": value}]
        spoilt += [good | {"meta_info": good["meta_info"] | {name: value}} for name in good["meta_info"]]
        for answer in map(orjson.dumps, spoilt):
            for body, streamed in ((answer, False), (event(answer), True)):
                for ended in (True, False):
                    reading = read_answer(raw(body, streamed, ended), asked())
                    if reading.completion is not None:
                        assert reading.completion.token_ids.tolist() == [token for _, token in ROWS]


def test_reading_imports_no_torch() -> None:
    code = "import sys, megatron_hdpo.rollout.sglang.reading; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
