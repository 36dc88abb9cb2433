"""From an answer of /generate to a Completion; checks everything that a server may get wrong."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson

from megatron_hdpo.rollout.sglang.stamps import RunStamp
from megatron_hdpo.types.rollouts import Completion, FinishReason, SamplingParams, TopKArrays

ROUNDING = 1e-3
"""Nats by which log-probs may contradict each other: float32 rounds by about 1e-5."""
LEAST_LOGPROB = -110.0
"""No sampled token has less: the smallest float32 probability above 0 is exp(-103)."""


class BadAnswerError(ValueError):
    """An answer that holds no valid completion: cut short, inconsistent, not finite, or not what was requested."""


class NoCompletionError(ValueError):
    """An answer that is no completion. status: the HTTP status that it stands for; None: the server did not end it."""

    def __init__(self, reason: str, status: int | None = 500) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class ExpertChoice:
    """Sizes that the experts in an answer must fit.

    layers: layers of the model. experts: experts per layer. per_token: experts that a token is sent to.
    """

    layers: int
    experts: int
    per_token: int


@dataclass(frozen=True)
class Asked:
    """The request that an answer must fit.

    sampling, prompt_length: of the request; prompt_length in tokens. vocab_size: of the model. stamp: of the run whose
    weights the servers hold. experts: sizes of the model's experts, None if it has none.
    """

    sampling: SamplingParams
    prompt_length: int
    vocab_size: int
    stamp: RunStamp
    experts: ExpertChoice | None = None


def decoded(body: bytes) -> dict[str, Any]:
    """Return the answer in a body, or in one event of a stream. Raises NoCompletionError when it is none."""
    try:
        answer = orjson.loads(body) if body else None
    except orjson.JSONDecodeError as error:
        raise NoCompletionError(f"the answer is not JSON: {bytes(body[:200])!r}") from error
    if isinstance(answer, dict) and isinstance(answer.get("meta_info"), dict):
        return answer
    # A stream has no status of its own for an error.
    said = answer.get("error") if isinstance(answer, dict) else None
    status = said.get("code") if isinstance(said, dict) else None
    reason = f"the answer is no completion: {str(answer)[:200]}"
    raise NoCompletionError(reason, status if isinstance(status, int) else 500)


def parse_completion(
    answer: dict[str, Any],
    sampling: SamplingParams,
    vocab_size: int,
    stamp: RunStamp,
    experts: ExpertChoice | None = None,
    prompt_length: int = 0,
) -> Completion:
    """Return the completion in an answer. Raises BadAnswerError with the reason when there is none.

    sampling: what was requested. stamp: of the run whose weights the servers hold; tokens of other weights get version
    UNVERSIONED. experts: sizes of the requested routed experts; None: none were requested, and any are ignored.
    prompt_length: prompt tokens, needed with `experts`.
    """
    try:
        completion = _completion(answer, sampling, vocab_size, stamp)
        if experts is None:
            return completion
        routed = _routed_experts(answer["meta_info"], prompt_length + len(completion.token_ids) - 1, experts)
        return replace(completion, routed_experts=routed)
    except BadAnswerError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BadAnswerError(f"an answer that cannot be read: {type(error).__name__}: {error}") from error


def _completion(answer: dict[str, Any], sampling: SamplingParams, vocab_size: int, stamp: RunStamp) -> Completion:
    meta = answer["meta_info"]
    ids = np.asarray(answer.get("output_ids") or [], dtype=np.int64)
    rows = meta.get("output_token_logprobs") or []
    reason = _finish_reason(meta, ids, sampling)
    if len(rows) != len(ids) or [row[1] for row in rows] != ids.tolist():
        raise BadAnswerError(f"{len(ids)} tokens with log-probs of {len(rows)}, or of others")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise BadAnswerError(f"a token id {ids.max()} beyond the vocabulary of {vocab_size}")
    logprobs = _sampled_logprobs(rows)
    top = _top(meta, len(ids), sampling.top_logprobs, vocab_size) if sampling.top_logprobs else None
    if top is not None:
        _check_agreement(top, ids, logprobs)
    return Completion(
        token_ids=ids.astype(np.int32),
        logprobs=logprobs,
        finish_reason=reason,
        weight_versions=_versions(meta, len(ids), stamp),
        top_logprobs=top,
    )


def _finish_reason(meta: dict[str, Any], ids: np.ndarray, sampling: SamplingParams) -> FinishReason:
    """Return why the response ended, once its tokens show the same.

    A server caps max_new_tokens silently at the room in its context and its cache, and ends a response whose logits are
    not finite like one with a stop token.
    """
    finish = meta.get("finish_reason") or {}
    reason = finish.get("type")
    if reason not in ("stop", "length") or not len(ids):
        raise BadAnswerError(f"finished by {reason!r} after {len(ids)} tokens {finish.get('message') or ''}".rstrip())
    is_stop = np.isin(ids, sampling.stop_token_ids)
    if is_stop[:-1].any():
        raise BadAnswerError(f"a stop token at place {int(is_stop.argmax())} of {len(ids)}, and it went on")
    if reason == "stop" and (not is_stop[-1] or isinstance(finish.get("matched"), str)):
        raise BadAnswerError(
            f"finished by 'stop' at {finish.get('matched')!r}, its last token is {ids[-1]}, but the stop tokens are "
            f"{list(sampling.stop_token_ids)}"
        )
    if reason == "length" and (is_stop[-1] or len(ids) != sampling.max_new_tokens):
        raise BadAnswerError(f"finished by 'length' after {len(ids)} of {sampling.max_new_tokens} tokens")
    if len(ids) > sampling.max_new_tokens:
        raise BadAnswerError(f"{len(ids)} tokens, at most {sampling.max_new_tokens} were requested")
    return reason


def _sampled_logprobs(rows: Sequence[Any]) -> np.ndarray:
    """Return the log-probs of the sampled tokens, float32 [T]; each is one of a token that can be sampled."""
    logprobs = np.array([row[0] for row in rows], dtype=np.float32)
    if not np.isfinite(logprobs).all():
        raise BadAnswerError(f"a log-prob that is not finite at token {int(np.argmin(np.isfinite(logprobs)))}")
    if logprobs.max() > ROUNDING or logprobs.min() < LEAST_LOGPROB:
        raise BadAnswerError(
            f"log-probs from {logprobs.min():.3g} to {logprobs.max():.3g}; those of a sampled token are between "
            f"{LEAST_LOGPROB:g} and 0"
        )
    return logprobs


def _check_agreement(top: TopKArrays, ids: np.ndarray, logprobs: np.ndarray) -> None:
    """Raise BadAnswerError when a row of top log-probs is no distribution's, or not the sampled token's."""
    values = top.logprobs_TK
    if (np.diff(values, axis=1) > ROUNDING).any():
        raise BadAnswerError("top log-probs that do not decrease")
    if (np.exp(values).sum(axis=1) > 1 + ROUNDING).any():
        raise BadAnswerError("top log-probs whose probabilities sum to more than 1")
    is_sampled = top.ids_TK == ids[:, None]
    listed = is_sampled.any(axis=1)
    own = np.where(listed, values[np.arange(len(ids)), is_sampled.argmax(axis=1)], values[:, -1])
    wrong = np.where(listed, np.abs(logprobs - own), logprobs - own) > ROUNDING
    if wrong.any():
        at = int(wrong.argmax())
        where = f"{own[at]:.5g} in its row" if listed[at] else f"not in its row, which ends at {own[at]:.5g}"
        raise BadAnswerError(f"token {ids[at]} at place {at} has log-prob {logprobs[at]:.5g}, but it is {where}")


def _routed_experts(meta: dict[str, Any], tokens: int, choice: ExpertChoice) -> np.ndarray:
    """Return the experts of each token, [tokens, layers, K].

    A server does not check that the experts of every token were recorded: a token left out has K equal experts, or
    those of another token.
    """
    if not meta.get("routed_experts"):
        raise BadAnswerError("no routed experts, though they were requested: enable-return-routed-experts is needed")
    flat = np.frombuffer(base64.b64decode(meta["routed_experts"], validate=True), dtype="<i4")
    shape = tokens, choice.layers, choice.per_token
    if flat.size != np.prod(shape):
        raise BadAnswerError(f"routed experts: {flat.size} numbers, {shape} (tokens, layers, per token) expected")
    if flat.min(initial=0) < 0 or flat.max(initial=0) >= choice.experts:
        raise BadAnswerError(f"routed experts from {flat.min()} to {flat.max()}, the model has {choice.experts}")
    sorted_TLK = np.sort(flat.reshape(shape), axis=-1)
    if (sorted_TLK[..., 1:] == sorted_TLK[..., :-1]).any():
        raise BadAnswerError("routed experts: one token is sent to one expert twice")
    return flat.reshape(shape).astype(np.uint8 if choice.experts <= 256 else np.uint16)


def _versions(meta: dict[str, Any], length: int, stamp: RunStamp) -> np.ndarray:
    """Return the version of each token: by spans where the server sends them, else one version for all."""
    versions = np.full(length, stamp.version(meta.get("weight_version")), dtype=np.int32)
    for span in meta.get("weight_versions") or []:
        versions[span["start"] : span["end"]] = stamp.version(span["version"])
    return versions


def _top(meta: dict[str, Any], length: int, k: int, vocab_size: int) -> TopKArrays:
    """Return the top log-probs, read from flat arrays where the server sends them, else from nested lists."""
    if "output_top_logprobs_val_flat_b64" in meta:
        values = _flat(meta, "val", np.float32).reshape(meta["output_top_logprobs_shape"])
        ids = _flat(meta, "idx", np.int32).reshape(meta["output_top_logprobs_shape"])
    else:
        rows = meta.get("output_top_logprobs") or []
        if any(len(row) != k for row in rows):
            raise BadAnswerError(f"top log-probs of other than {k} tokens")
        values = np.array([[entry[0] for entry in row] for row in rows], dtype=np.float32)
        ids = np.array([[entry[1] for entry in row] for row in rows], dtype=np.int32)
    if values.shape != (length, k):
        raise BadAnswerError(f"top log-probs of shape {values.shape} for {length} tokens and k = {k}")
    if not np.isfinite(values).all():
        raise BadAnswerError("a top log-prob that is not finite")
    if ids.shape != values.shape or ids.min() < 0 or ids.max() >= vocab_size:
        raise BadAnswerError(f"top tokens of shape {ids.shape}, or beyond the vocabulary of {vocab_size}")
    return TopKArrays(ids, values)


def _flat(meta: dict[str, Any], name: str, dtype: type) -> np.ndarray:
    key = f"output_top_logprobs_{name}_flat_b64"
    return np.frombuffer(base64.b64decode(meta[key]), dtype=meta[f"{key}_dtype"]).astype(dtype)
