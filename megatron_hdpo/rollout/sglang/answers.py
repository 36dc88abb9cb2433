"""From the answer to /generate to a completion, with everything checked that a server may get wrong."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from megatron_hdpo.rollout.types import Completion, TopLogprobs

UNVERSIONED = -1
"""Version of weights that the trainer has not stamped: those that a server was started with."""
LARGEST_VERSION = 2**31 - 1


class BadAnswerError(ValueError):
    """An answer that is no completion: cut short, inconsistent, or not finite."""


def completion_of(answer: dict[str, Any], top_logprobs: int, vocab_size: int) -> Completion:
    """The completion in an answer. Raises BadAnswerError with the reason when there is none."""
    try:
        return _completion(answer, top_logprobs, vocab_size)
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


def _versions(meta: dict[str, Any], length: int) -> np.ndarray:
    """The version of each token: spans where the server tells them, else one version for all."""
    versions = np.full(length, _number(meta.get("weight_version")), dtype=np.int32)
    for span in meta.get("weight_versions") or []:
        versions[span["start"] : span["end"]] = _number(span["version"])
    return versions


def _number(version: Any) -> int:
    """The trainer stamps steps; what others have stamped (a date, a name) is none of them."""
    text = str(version)
    return int(text) if text.isdecimal() and int(text) <= LARGEST_VERSION else UNVERSIONED


def _top(meta: dict[str, Any], length: int, k: int, vocab_size: int) -> TopLogprobs:
    """Flat arrays where the server gives them, else its nested lists."""
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
    return TopLogprobs(ids, values)


def _flat(meta: dict[str, Any], name: str, dtype: type) -> np.ndarray:
    key = f"output_top_logprobs_{name}_flat_b64"
    return np.frombuffer(base64.b64decode(meta[key]), dtype=meta[f"{key}_dtype"]).astype(dtype)
