"""Text of a response as judges and readers get it: without special tokens, but with its thoughts marked.

A judge must see where thoughts begin and end, or takes a guess inside of them for the answer. Two kinds of models hide
that: templates that end the prompt with `<think>`, which the response then lacks, and tokenizers to which `<think>` and
`</think>` are special tokens, which decoding drops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol

import numpy as np

from megatron_hdpo.rewards.extraction import THOUGHT_BEGIN, THOUGHT_END

_LAST_TOKENS = 32
"""Tokens of a prompt that are looked at: more than the bytes of the mark and the space behind it."""


class Decoder(Protocol):
    """The part of a Hugging Face tokenizer that texts of responses need."""

    all_special_tokens: Sequence[str]

    def convert_tokens_to_ids(self, tokens: str) -> Any: ...

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = ...) -> str: ...


class ResponseText:
    """Decoder of responses with one tokenizer."""

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        special = set(tokenizer.all_special_tokens)
        marks = [mark for mark in (THOUGHT_BEGIN, THOUGHT_END) if mark in special]
        self._marks = {int(tokenizer.convert_tokens_to_ids(mark)): mark for mark in marks}

    def __call__(self, token_ids: np.ndarray) -> str:
        """Return the text of ids [T], without special tokens other than those around thoughts."""
        return "".join(self._parts(token_ids.tolist()))

    def opened_by(self, prompt_ids: np.ndarray) -> str:
        """Return the mark of a thought that the prompt's ids [P] end with, and the space behind it; else ""."""
        end = self._tokenizer.decode(prompt_ids[-_LAST_TOKENS:].tolist(), skip_special_tokens=False)
        return end[end.rindex(THOUGHT_BEGIN) :] if end.rstrip().endswith(THOUGHT_BEGIN) else ""

    def _parts(self, ids: list[int]) -> Iterator[str]:
        if self._marks.keys().isdisjoint(ids):
            yield self._decoded(ids)
            return
        for is_mark, run in groupby(ids, self._marks.__contains__):
            part = list(run)
            yield "".join(map(self._marks.__getitem__, part)) if is_mark else self._decoded(part)

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
