"""From an answer of /generate to a Completion; checks everything that a server may get wrong."""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_hdpo.types.rollouts import Completion, TopKArrays

UNVERSIONED = -1
"""Version of weights that the trainer did not stamp: those that a server was started with."""
LARGEST_VERSION = 2**31 - 1


class BadAnswerError(ValueError):
    """An answer that holds no valid completion: cut short, inconsistent, or not finite."""


@dataclass(frozen=True)
class ExpertChoice:
    """Sizes that the experts in an answer must fit.

    layers: layers of the model. experts: experts per layer. per_token: experts that a token is sent to.
    """

    layers: int
    experts: int
    per_token: int


def parse_completion(
    answer: dict[str, Any],
    top_logprobs: int,
    vocab_size: int,
    experts: ExpertChoice | None = None,
    prompt_length: int = 0,
) -> Completion:
    """Return the completion in an answer. Raises BadAnswerError with the reason when there is none.

    top_logprobs: number K that was requested. experts: sizes of the requested routed experts; None: none were
    requested, and any are ignored. prompt_length: prompt tokens, needed with `experts`.
    """
    try:
        completion = _completion(answer, top_logprobs, vocab_size)
        if experts is None:
            return completion
        routed = _routed_experts(answer["meta_info"], prompt_length + len(completion.token_ids) - 1, experts)
        return replace(completion, routed_experts=routed)
    except BadAnswerError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BadAnswerError(f"an answer that cannot be read: {type(error).__name__}: {error}") from error


def _completion(answer: dict[str, Any], top_logprobs: int, vocab_size: int) -> Completion:
    meta = answer["meta_info"]
    ids = np.asarray(answer.get("output_ids") or [], dtype=np.int64)
    reason = (meta.get("finish_reason") or {}).get("type")
    if reason not in ("stop", "length"):
        detail = (meta.get("finish_reason") or {}).get("message") or ""
        raise BadAnswerError(f"finished by {reason!r} after {len(ids)} tokens {detail}".rstrip())
    rows = meta.get("output_token_logprobs") or []
    if not len(ids) or len(rows) != len(ids) or any(row[1] != token for row, token in zip(rows, ids, strict=True)):
        raise BadAnswerError(f"{len(ids)} tokens with log-probs of {len(rows)}, or of others")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise BadAnswerError(f"a token id {ids.max()} beyond the vocabulary of {vocab_size}")
    logprobs = np.array([row[0] for row in rows], dtype=np.float32)
    if not np.isfinite(logprobs).all():
        raise BadAnswerError(f"a log-prob that is not finite at token {int(np.argmin(np.isfinite(logprobs)))}")
    return Completion(
        token_ids=ids.astype(np.int32),
        logprobs=logprobs,
        finish_reason=reason,
        weight_versions=_versions(meta, len(ids)),
        top_logprobs=_top(meta, len(ids), top_logprobs, vocab_size) if top_logprobs else None,
    )


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


def _versions(meta: dict[str, Any], length: int) -> np.ndarray:
    """Return the version of each token: by spans where the server sends them, else one version for all."""
    versions = np.full(length, _number(meta.get("weight_version")), dtype=np.int32)
    for span in meta.get("weight_versions") or []:
        versions[span["start"] : span["end"]] = _number(span["version"])
    return versions


def _number(version: Any) -> int:
    """Return the step that the trainer stamped; UNVERSIONED for any other stamp (a date, a name)."""
    text = str(version)
    return int(text) if text.isdecimal() and int(text) <= LARGEST_VERSION else UNVERSIONED


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
