"""What is kept of a request that ended early, and how it is joined with what follows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from one_engine import request

from megatron_hdpo.rollout.sglang.answers import Asked
from megatron_hdpo.rollout.sglang.partial import as_finished, continuation, joined, read_beginning, shortened
from megatron_hdpo.rollout.sglang.stamps import RunStamp
from megatron_hdpo.rollout.sglang.streamed import StreamedAnswer
from megatron_hdpo.types.rollouts import Completion, GenerationRequest, TopKArrays

VOCAB, LAYERS, PER_TOKEN = 17, 2, 1
STAMP = RunStamp()


def asked(wanted: GenerationRequest) -> Asked:
    return Asked(wanted.sampling, len(wanted.prompt_ids), VOCAB, STAMP)


def completion(ids: list[int], version: int, experts_from: int | None = None, **kw: Any) -> Completion:
    """experts_from: number of the first expert, of those of the 3 prompt tokens and of the ids but the last."""
    rows = 3 + len(ids) - 1
    routed = None if experts_from is None else np.arange(experts_from, experts_from + rows * LAYERS * PER_TOKEN)
    return Completion(
        token_ids=np.array(ids, dtype=np.int32),
        logprobs=-np.array(ids, dtype=np.float32),
        finish_reason="length",
        weight_versions=np.full(len(ids), version, dtype=np.int32),
        top_logprobs=TopKArrays(np.array(ids)[:, None], -np.array(ids, dtype=np.float32)[:, None]),
        routed_experts=None if routed is None else routed.reshape(rows, LAYERS, PER_TOKEN).astype(np.uint8),
        **kw,
    )


def piece(ids: list[int], total: int, version: int = 1, **meta: Any) -> dict[str, Any]:
    rows = [[-0.5, token, None] for token in ids]
    meta = {"finish_reason": None, "completion_tokens": total, "weight_version": STAMP.of(version)} | meta
    return {"output_ids": ids, "meta_info": meta | {"output_token_logprobs": rows}}


def test_pieces_make_up_the_answer() -> None:
    streamed = StreamedAnswer()
    assert streamed.add(piece([5], 1)) is None and streamed.add(piece([6, 7], 3)) is None
    answer = streamed.add(piece([8], 4, finish_reason={"type": "stop"}))
    assert answer is not None and answer["output_ids"] == [5, 6, 7, 8]
    assert [row[1] for row in answer["meta_info"]["output_token_logprobs"]] == [5, 6, 7, 8]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop"}


def test_a_request_that_is_aborted_while_it_waits_repeats_its_last_token() -> None:
    streamed = StreamedAnswer()
    streamed.add(piece([5, 6], 2))
    repeated = piece([5, 6], 2, finish_reason={"type": "abort"}) | {"output_ids": [6]}
    answer = streamed.add(repeated)
    assert answer is not None and answer["output_ids"] == [5, 6]
    assert [row[1] for row in answer["meta_info"]["output_token_logprobs"]] == [5, 6]
    late = StreamedAnswer()
    late.add(piece([5], 1))
    answer = late.add(repeated)
    assert answer is not None and answer["output_ids"] == [5, 6], "the last token had not been sent yet"
    assert [row[1] for row in answer["meta_info"]["output_token_logprobs"]] == [5, 6]


def test_tokens_of_an_unknown_version_are_not_kept() -> None:
    """The update may have come anywhere between the second piece and the third one."""
    streamed = StreamedAnswer()
    for part in (piece([5], 1), piece([6, 7], 3), piece([8, 9], 5, 2), piece([10], 6, 2)):
        streamed.add(part)
    beginning = read_beginning(streamed.so_far(), asked(request()))
    assert beginning is not None and beginning.token_ids.tolist() == [5, 6, 7]
    assert beginning.weight_versions.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a | {"output_ids": []},
        lambda a: a | {"output_ids": [5, 6]},
        lambda a: a | {"output_ids": [5, VOCAB, 7]},
        lambda a: {},
    ],
    ids=["nothing", "other log-probs", "beyond the vocabulary", "no answer"],
)
def test_what_cannot_be_trusted_is_not_kept(spoil: Any) -> None:
    streamed = StreamedAnswer()
    streamed.add(piece([5, 6, 7], 3))
    assert read_beginning(streamed.so_far(), asked(request())) is not None
    assert read_beginning(spoil(streamed.so_far()), asked(request())) is None


def test_a_beginning_that_ends_in_a_stop_token_is_a_sample() -> None:
    """An aborted request makes one more step, whose token may be the last."""
    streamed = StreamedAnswer()
    streamed.add(piece([5, 6, 1], 3))
    wanted = request(tokens=8, stop_token_ids=(1,))
    beginning = read_beginning(streamed.so_far(), asked(wanted))
    assert beginning is not None
    finished = as_finished(beginning, wanted)
    assert finished is not None and finished.finish_reason == "stop"
    at_limit = as_finished(beginning, request(tokens=3))
    assert at_limit is not None and at_limit.finish_reason == "length"
    assert as_finished(beginning, request(tokens=8)) is None
    assert as_finished(beginning, request(tokens=3, routed_experts=True)) is None, "its experts are missing"


def test_the_rest_is_asked_for_after_the_beginning() -> None:
    wanted = request(tokens=8, prompt=(2, 3, 4), top_logprobs=1, stop_token_ids=(1,))
    rest = continuation(wanted, completion([5, 6], 1))
    assert rest.prompt_ids.tolist() == [2, 3, 4, 5, 6] and rest.sampling.max_new_tokens == 6
    assert (rest.seed, rest.affinity, rest.sampling.stop_token_ids) == (wanted.seed, wanted.affinity, (1,))


def test_every_row_of_a_continued_sample_is_its_token_s_own() -> None:
    first, rest = completion([5, 6], 1, experts_from=0), completion([7, 8, 9], 2)
    after = np.arange(100, 100 + (3 + 2 + 3 - 1) * LAYERS).reshape(-1, LAYERS, PER_TOKEN).astype(np.uint8)
    rest = replace(rest, routed_experts=after, finish_reason="stop")
    whole = joined(first, rest)
    assert whole.token_ids.tolist() == [5, 6, 7, 8, 9] and whole.logprobs.tolist() == [-5, -6, -7, -8, -9]
    assert whole.weight_versions.tolist() == [1, 1, 2, 2, 2] and whole.finish_reason == "stop"
    assert whole.top_logprobs is not None and whole.top_logprobs.ids_TK[:, 0].tolist() == [5, 6, 7, 8, 9]
    assert whole.routed_experts is not None and first.routed_experts is not None
    assert len(whole.routed_experts) == 3 + 5 - 1
    assert (whole.routed_experts[:4] == first.routed_experts).all() and (whole.routed_experts[4:] == after[4:]).all()
    without = joined(replace(first, routed_experts=None), rest)
    assert (without.routed_experts == after).all(), "the server that went on has run all tokens"
    assert joined(None, rest) is rest


def test_a_beginning_is_shortened_to_what_servers_accept_as_a_prompt() -> None:
    beginning = completion([5, 6, 7], 1, experts_from=0)
    assert shortened(beginning, 3, prompt_tokens=3) is beginning and shortened(beginning, 0, prompt_tokens=3) is None
    short = shortened(beginning, 2, prompt_tokens=3)
    assert short is not None and short.token_ids.tolist() == [5, 6]
    assert short.top_logprobs is not None and len(short.top_logprobs.ids_TK) == 2
    assert short.routed_experts is not None and len(short.routed_experts) == 4
