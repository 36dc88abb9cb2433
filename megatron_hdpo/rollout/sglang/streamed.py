"""Answer of one sampling request while it arrives in pieces."""

from __future__ import annotations

from typing import Any

Answer = dict[str, Any]


class StreamedAnswer:
    """Tokens and log-probs of a request so far, each piece holding the new ones only.

    A piece states the version of the weights when it was sent. After a change of the version the tokens of a piece may
    be of either, until the last piece states the version of each token.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._rows: list[Any] = []
        self._version: Any = None
        self._of_one_version = 0

    def add(self, piece: Answer) -> Answer | None:
        """Add a piece; return the whole answer, as without streaming, if this piece is the last one."""
        meta, ids = piece["meta_info"], piece.get("output_ids") or []
        rows = meta.get("output_token_logprobs") or []
        before, finish = len(self._ids), meta.get("finish_reason")
        if finish is not None and finish.get("type") == "abort":
            # A request that is aborted while it waits repeats its last token, with the log-probs of all.
            ids = ids if meta.get("completion_tokens") == before + len(ids) else []
            rows = rows[-len(ids) :] if ids else []
        self._ids += ids
        self._rows += rows
        if not before:
            self._version = meta.get("weight_version")
        if meta.get("weight_version") == self._version and self._of_one_version == before:
            self._of_one_version = len(self._ids)
        if finish is None:
            return None
        return piece | {"output_ids": self._ids, "meta_info": meta | {"output_token_logprobs": self._rows}}

    def so_far(self) -> Answer:
        """Return the tokens whose version is known, as an answer that was aborted."""
        known = self._of_one_version
        meta = {"finish_reason": {"type": "abort"}, "weight_version": self._version}
        return {"output_ids": self._ids[:known], "meta_info": meta | {"output_token_logprobs": self._rows[:known]}}
