"""Continuation of samples: what a request had generated when it ended early is the beginning of the next one's prompt.

A beginning is a Completion whose `finish_reason` says nothing. With the same weights, and the same seed in
deterministic inference, a continued sample is the one that would have come without the interruption.

Shape suffixes: T tokens, K top tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from megatron_hdpo.rollout.sglang.answers import Asked, BadAnswerError, parse_completion
from megatron_hdpo.types.rollouts import Completion, GenerationRequest, TopKArrays


def read_beginning(answer: dict[str, Any], asked: Asked) -> Completion | None:
    """Return what an answer that ended early holds of a sample; None when that is nothing, or cannot be trusted."""
    meta, ids = answer.get("meta_info") or {}, answer.get("output_ids")
    if not ids:
        return None
    stopped = ids[-1] in asked.sampling.stop_token_ids
    whole = answer | {"meta_info": meta | {"finish_reason": {"type": "stop" if stopped else "length"}}}
    try:
        return parse_completion(
            whole,
            replace(asked.sampling, max_new_tokens=len(ids)),
            asked.vocab_size,
            asked.stamp,
            asked.experts if meta.get("routed_experts") else None,
            asked.prompt_length,
        )
    except BadAnswerError:
        return None


def as_finished(beginning: Completion, request: GenerationRequest) -> Completion | None:
    """Return the beginning as a completion if its sample had just ended; None while tokens are missing."""
    sampling = request.sampling
    if sampling.routed_experts and beginning.routed_experts is None:
        return None
    if beginning.token_ids[-1] in sampling.stop_token_ids:
        return replace(beginning, finish_reason="stop")
    if len(beginning.token_ids) == sampling.max_new_tokens:
        return replace(beginning, finish_reason="length")
    return None


def continuation(request: GenerationRequest, beginning: Completion) -> GenerationRequest:
    """Return the request for the tokens that follow `beginning`, which is shorter than `max_new_tokens`."""
    return replace(
        request,
        prompt_ids=np.concatenate([request.prompt_ids, beginning.token_ids]),
        sampling=replace(request.sampling, max_new_tokens=request.sampling.max_new_tokens - len(beginning.token_ids)),
    )


def shortened(beginning: Completion, tokens: int, prompt_tokens: int) -> Completion | None:
    """Return the first `tokens` tokens of a beginning, None if that leaves none."""
    if tokens >= len(beginning.token_ids):
        return beginning
    if tokens <= 0:
        return None
    top, routed = beginning.top_logprobs, beginning.routed_experts
    return replace(
        beginning,
        token_ids=beginning.token_ids[:tokens],
        logprobs=beginning.logprobs[:tokens],
        weight_versions=beginning.weight_versions[:tokens],
        top_logprobs=None if top is None else TopKArrays(top.ids_TK[:tokens], top.logprobs_TK[:tokens]),
        routed_experts=None if routed is None else routed[: prompt_tokens + tokens - 1],
    )


def joined(beginning: Completion | None, rest: Completion) -> Completion:
    """Return the sample of a beginning and of the answer to its `continuation`.

    The experts of the beginning are those that it was sampled with, or, where the request did not live to tell them,
    those of the server that went on, which has run all the tokens before its own.
    """
    if beginning is None:
        return rest
    routed = rest.routed_experts
    if routed is not None and beginning.routed_experts is not None:
        routed = np.concatenate([beginning.routed_experts, routed[len(beginning.routed_experts) :]])
    return replace(
        rest,
        token_ids=np.concatenate([beginning.token_ids, rest.token_ids]),
        logprobs=np.concatenate([beginning.logprobs, rest.logprobs]),
        weight_versions=np.concatenate([beginning.weight_versions, rest.weight_versions]),
        top_logprobs=_joined_tops(beginning.top_logprobs, rest.top_logprobs),
        routed_experts=routed,
    )


def _joined_tops(first: TopKArrays | None, second: TopKArrays | None) -> TopKArrays | None:
    if first is None or second is None:
        return None
    return TopKArrays(
        np.concatenate([first.ids_TK, second.ids_TK]), np.concatenate([first.logprobs_TK, second.logprobs_TK])
    )
