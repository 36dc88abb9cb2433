"""What of a server's answer becomes a completion, and what never does."""

from __future__ import annotations

import base64
import copy
from typing import Any

import numpy as np
import pytest

from megatron_hdpo.rollout.sglang.answers import BadAnswerError, ExpertChoice, parse_completion
from megatron_hdpo.rollout.sglang.stamps import UNVERSIONED, RunStamp
from megatron_hdpo.types.rollouts import Completion, SamplingParams

VOCAB = 17
STAMP = RunStamp("0123456789abcdef")
OTHER = RunStamp("fedcba9876543210")
IDS = [4, 9, 1]
LOGPROBS = [-0.5, -1.25, -3.0]
TOP_VALUES = [[-0.5, -1.5], [-0.75, -1.25], [-0.25, -2.0]]
TOP_IDS = [[4, 2], [3, 9], [0, 16]]
Answer = dict[str, Any]


def parse(answer: Answer, top: int = 0, max_new: int = 5, stops: tuple[int, ...] = (1,), **experts: Any) -> Completion:
    """The completion in the answer to a request of this run."""
    return parse_completion(
        answer, SamplingParams(max_new, top_logprobs=top, stop_token_ids=stops), VOCAB, STAMP, **experts
    )


def answer(**meta: Any) -> Answer:
    """As SGLang gives it for three tokens."""
    rows = [[value, token, None] for value, token in zip(LOGPROBS, IDS, strict=True)]
    fields = {
        "finish_reason": {"type": "stop", "matched": 1},
        "weight_version": STAMP.of(7),
        "output_token_logprobs": rows,
        "completion_tokens": 3,
    }
    return {"text": "", "output_ids": list(IDS), "meta_info": fields | meta}


def span(version: int | str, start: int, end: int) -> Answer:
    stamp = STAMP.of(version) if isinstance(version, int) else version
    return {"version": stamp, "start": start, "end": end}


def nested() -> Answer:
    rows = zip(TOP_VALUES, TOP_IDS, strict=True)
    return {"output_top_logprobs": [[[v, i, None] for v, i in zip(*row, strict=True)] for row in rows]}


def flat(values: Any = TOP_VALUES, ids: Any = TOP_IDS, kind: type = np.float32) -> Answer:
    packed = {"val": np.array(values, dtype=kind), "idx": np.array(ids, dtype=np.int32)}
    fields: Answer = {"output_top_logprobs_shape": list(np.shape(values))}
    for name, array in packed.items():
        fields[f"output_top_logprobs_{name}_flat_b64"] = base64.b64encode(array.tobytes()).decode()
        fields[f"output_top_logprobs_{name}_flat_b64_dtype"] = str(array.dtype)
    return fields


def test_a_completion_is_what_the_server_said() -> None:
    completion = parse(answer())
    assert completion.token_ids.dtype == np.int32 and completion.token_ids.tolist() == IDS
    assert completion.logprobs.dtype == np.float32 and completion.logprobs.tolist() == LOGPROBS
    assert completion.finish_reason == "stop" and completion.top_logprobs is None
    assert completion.weight_versions.dtype == np.int32 and completion.weight_versions.tolist() == [7, 7, 7]
    cut = answer(finish_reason={"type": "length", "length": 3})
    assert parse(cut, max_new=3, stops=()).finish_reason == "length"


@pytest.mark.parametrize("top", [nested(), flat(), flat(kind=np.float64)], ids=["nested", "flat", "flat, float64"])
def test_top_log_probs_in_either_form(top: Answer) -> None:
    found = parse(answer(**top), 2).top_logprobs
    assert found is not None and found.ids_TK.dtype == np.int32 and found.logprobs_TK.dtype == np.float32
    assert found.ids_TK.tolist() == TOP_IDS and found.logprobs_TK.tolist() == TOP_VALUES
    assert parse(answer(**top)).top_logprobs is None, "not asked for"


@pytest.mark.parametrize(
    ("meta", "versions"),
    [
        ({"weight_versions": [span(6, 0, 2), span(7, 2, 3)]}, [6, 6, 7]),
        ({"weight_versions": [span(6, 0, 1)]}, [6, 7, 7]),
        ({"weight_versions": []}, [7, 7, 7]),
        ({"weight_version": "default"}, [UNVERSIONED] * 3),
        ({"weight_version": None}, [UNVERSIONED] * 3),
        ({"weight_version": "7"}, [UNVERSIONED] * 3),
        ({"weight_version": OTHER.of(7)}, [UNVERSIONED] * 3),
        ({"weight_version": STAMP.of(7) + "²"}, [UNVERSIONED] * 3),
        ({"weight_version": STAMP.of(7) + "0" * 12}, [UNVERSIONED] * 3),
        ({"weight_versions": [span(OTHER.of(7), 0, 1)]}, [UNVERSIONED, 7, 7]),
    ],
    ids=[
        "two",
        "one",
        "no span",
        "default",
        "none",
        "a number",
        "another run",
        "no digits",
        "beyond",
        "another's span",
    ],
)
def test_every_token_has_a_version(meta: Answer, versions: list[int]) -> None:
    assert parse(answer(**meta)).weight_versions.tolist() == versions


BROKEN: dict[str, tuple[Answer, str]] = {
    "aborted": (answer(finish_reason={"type": "abort", "message": "no room"}), "finished by 'abort' .*no room"),
    "not finished": (answer(finish_reason=None), "finished by None"),
    "no tokens": (answer(output_token_logprobs=[]) | {"output_ids": []}, "0 tokens"),
    "tokens missing": (answer() | {"output_ids": IDS[1:]}, "2 tokens with log-probs of 3"),
    "of other tokens": (answer() | {"output_ids": [4, 8, 1]}, "or of others"),
    "no log-probs": (answer(output_token_logprobs=None), "log-probs of 0"),
    "beyond the vocabulary": (
        answer(output_token_logprobs=[[-1.0, VOCAB, None], [-1.0, 1, None]]) | {"output_ids": [VOCAB, 1]},
        "beyond the vocabulary of 17",
    ),
    "negative": (
        answer(output_token_logprobs=[[-1.0, -1, None], [-1.0, 1, None]]) | {"output_ids": [-1, 1]},
        "beyond the vocabulary",
    ),
    "null log-prob": (
        answer(output_token_logprobs=[[-0.5, 4, None], [None, 9, None], [-1, 1, None]]),
        "not finite at token 1",
    ),
    "infinite": (answer(output_token_logprobs=[[float("-inf"), i, None] for i in IDS]), "not finite at token 0"),
    "no top": (answer(), r"top log-probs of shape \(0,\)"),
    "too few top": (answer(output_top_logprobs=[row[:1] for row in nested()["output_top_logprobs"]]), "other than 2"),
    "top of fewer tokens": (answer(output_top_logprobs=nested()["output_top_logprobs"][:2]), "for 3 tokens and k = 2"),
    "flat top of fewer": (answer(**flat(TOP_VALUES[:2], TOP_IDS[:2])), "for 3 tokens and k = 2"),
    "top not finite": (answer(**flat([[float("nan"), -1.0]] * 3)), "a top log-prob that is not finite"),
    "top beyond": (answer(**flat(ids=[[4, VOCAB]] * 3)), "beyond the vocabulary"),
    "no shape": (answer(**flat() | {"output_top_logprobs_shape": None}), r"top log-probs of shape \(6,\)"),
    "a word for a reason": (answer(finish_reason="stop"), "answer"),
    "rows without ids": (answer(output_token_logprobs=[[-1.0]] * 3), "answer"),
    "words for ids": (answer() | {"output_ids": ["a", "b", "c"]}, "answer"),
    "spans without ends": (answer(weight_versions=[{"version": "7"}]), "answer"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_what_is_no_completion(name: str) -> None:
    broken, words = BROKEN[name]
    with pytest.raises(BadAnswerError, match=words):
        parse(broken, 2 if "top" in name or name == "no shape" else 0)


LENGTH = {"type": "length", "length": 3}
CONTRADICTIONS: dict[str, tuple[Answer, dict[str, Any], str]] = {
    "cut by the server": (answer(finish_reason=LENGTH), {"stops": ()}, "'length' after 3 of 5 tokens"),
    "longer than requested": (answer(finish_reason=LENGTH), {"stops": (), "max_new": 2}, "'length' after 3 of 2"),
    "a late stop": (answer(), {"max_new": 2}, "3 tokens, at most 2 were requested"),
    "length at a stop token": (answer(finish_reason=LENGTH), {"max_new": 3}, "'length' after 3 of 3"),
    "stop at another token": (answer(), {"stops": (2, 3)}, r"its last token is 1, but the stop tokens are \[2, 3\]"),
    "stop without stop tokens": (answer(), {"stops": ()}, r"the stop tokens are \[\]"),
    "stop for NaN": (answer(finish_reason={"type": "stop", "matched": "NaN happened"}), {}, "at 'NaN happened'"),
    "a stop token amid": (answer(), {"stops": (1, 9)}, "a stop token at place 1 of 3"),
    "positive": (answer(output_token_logprobs=[[5 + v, i] for v, i in zip(LOGPROBS, IDS, strict=True)]), {}, "to 4.5"),
    "impossible": (answer(output_token_logprobs=[[-3e38, i] for i in IDS]), {}, "log-probs from -3e"),
    "shifted": (
        answer(**flat(), output_token_logprobs=[[v - 0.3, i] for v, i in zip(LOGPROBS, IDS, strict=True)]),
        {"top": 2},
        "token 4 at place 0 has log-prob -0.8, but it is -0.5 in its row",
    ),
    "likelier than its row": (
        answer(
            **nested(), output_token_logprobs=[*([v, i] for v, i in zip(LOGPROBS[:2], IDS[:2], strict=True)), [-1.9, 1]]
        ),
        {"top": 2},
        "token 1 at place 2 has log-prob -1.9, but it is not in its row, which ends at -2",
    ),
    "rows in no order": (answer(**flat([row[::-1] for row in TOP_VALUES])), {"top": 2}, "do not decrease"),
    "rows of no distribution": (
        answer(**flat([[v + 0.3 for v in row] for row in TOP_VALUES])),
        {"top": 2},
        "sum to more",
    ),
    "a positive row": (answer(**flat([[0.1, -9.0], *TOP_VALUES[1:]])), {"top": 2}, "sum to more"),
}


@pytest.mark.parametrize("name", list(CONTRADICTIONS))
def test_an_answer_that_contradicts_itself_or_the_request(name: str) -> None:
    broken, asked, words = CONTRADICTIONS[name]
    with pytest.raises(BadAnswerError, match=words):
        parse(broken, **asked)


def test_rounding_is_no_contradiction() -> None:
    rows = [[1e-5, 4], [-1.25 + 1e-5, 9], [-2.0 + 1e-5, 1]]
    top = flat([[2e-5, -20.0], [-0.75, -1.25], [-0.25, -2.0]])
    assert parse(answer(**top, output_token_logprobs=rows), 2).logprobs[0] > 0


PROMPT = 2  # tokens
CHOICE = ExpertChoice(layers=2, experts=300, per_token=3)


def experts(tokens: int = PROMPT + len(IDS) - 1, low: int = 0, high: int = 300) -> np.ndarray:
    """int32 [tokens, layers, per token], no expert twice for a token."""
    draws = np.random.default_rng(0)
    rows = [draws.choice(np.arange(low, high), CHOICE.per_token, replace=False) for _ in range(tokens * CHOICE.layers)]
    return np.array(rows, dtype=np.int32).reshape(tokens, CHOICE.layers, CHOICE.per_token)


def routed(experts_TLK: np.ndarray) -> Answer:
    return answer(routed_experts=base64.b64encode(experts_TLK.tobytes()).decode())


def test_experts_of_every_token_but_the_last() -> None:
    found = parse(routed(experts()), experts=CHOICE, prompt_length=PROMPT).routed_experts
    assert found is not None and found.dtype == np.uint16 and (found == experts()).all()
    few = ExpertChoice(2, 256, 3)
    found = parse(routed(experts(high=256)), experts=few, prompt_length=PROMPT).routed_experts
    assert found is not None and found.dtype == np.uint8 and (found == experts(high=256)).all()
    assert parse(routed(experts())).routed_experts is None, "not asked for"


def one_twice() -> np.ndarray:
    """Of a token whose experts were not noted, a server says 0 for all."""
    changed = experts(low=1)
    changed[2, 1] = 0
    return changed


NO_EXPERTS: dict[str, tuple[Answer, str]] = {
    "none": (answer(), "no routed experts, though they were requested"),
    "null": (answer(routed_experts=None), "no routed experts"),
    "of the response alone": (routed(experts(len(IDS))), r"18 numbers, \(4, 2, 3\)"),
    "of the last token too": (routed(experts(PROMPT + len(IDS))), r"30 numbers, \(4, 2, 3\)"),
    "beyond the model's": (routed(experts(low=298, high=301)), "to 300, the model has 300"),
    "negative": (routed(experts(high=3) - 1), "routed experts from -1"),
    "one twice": (routed(one_twice()), "to one expert twice"),
    "not base64": (answer(routed_experts="%"), "answer that cannot be read"),
    "half a number": (answer(routed_experts="AAAA"), "answer that cannot be read"),
    "a list": (answer(routed_experts=[1, 2]), "answer that cannot be read"),
}


@pytest.mark.parametrize("name", list(NO_EXPERTS))
def test_experts_that_are_not_those_of_the_tokens(name: str) -> None:
    broken, words = NO_EXPERTS[name]
    with pytest.raises(BadAnswerError, match=words):
        parse(broken, experts=CHOICE, prompt_length=PROMPT)


def test_no_field_that_is_missing_or_of_another_type_raises_anything_else() -> None:
    good = answer(**flat(), weight_versions=[span(7, 0, 3)])
    for name in good["meta_info"]:
        for value in (None, 3, "x", [], {}, [None], [[]]):
            spoiled = copy.deepcopy(good)
            spoiled["meta_info"][name] = value
            try:
                completion = parse(spoiled, 2)
            except BadAnswerError:
                continue
            assert completion.token_ids.tolist() == IDS and completion.logprobs.tolist() == LOGPROBS, name
