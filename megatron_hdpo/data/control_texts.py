"""Texts of the tokens that control a conversation, which must not come from data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_SHORTEST = 3


class ControlTexts:
    """Texts of special tokens, and of added ones that the chat template uses or that look like a mark.

    Llama 3's <|start_header_id|> is no special token of its tokenizer's map, and Qwen's <tool_call> is not flagged as
    special. Added tokens that are words, blanks or single letters belong to ordinary text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.texts = frozenset(_control_texts(tokenizer))
        longest_first = sorted(self.texts, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def first(self, text: str) -> str | None:
        """Return the first of them in a text, None if it has none."""
        found = self._pattern.search(text) if self._pattern else None
        return found[0] if found else None

    def removed(self, text: str) -> str:
        """Return a text without them, also without those that appear when another is removed."""
        while self.first(text):
            text = self.sub(lambda _: "", text)
        return text

    def sub(self, replace: Callable[[str], str], text: str) -> str:
        """Return a text with each of them replaced."""
        return self._pattern.sub(lambda found: replace(found[0]), text) if self._pattern else text

    def split(self, text: str) -> list[tuple[str, str]]:
        """Return a text as pairs of ordinary text and the control text after it; the last has none after it."""
        pairs, end = [], 0
        for found in self._pattern.finditer(text) if self._pattern else ():
            pairs.append((text[end : found.start()], found[0]))
            end = found.end()
        return [*pairs, (text[end:], "")]


def _control_texts(tokenizer: Any) -> set[str]:
    decoder: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    template = getattr(tokenizer, "chat_template", None) or ""
    source = template if isinstance(template, str) else "\n".join(map(str, dict(template).values()))
    texts = set(tokenizer.all_special_tokens)
    texts |= {str(token) for token in decoder.values() if token.special or str(token) in source or _is_mark(str(token))}
    return {text for text in texts if len(text) >= _SHORTEST and text.strip()}


def _is_mark(text: str) -> bool:
    """Return whether a text has letters or digits between two signs, as <tool_call> and [INST] have."""
    ends = (text[0], text[-1]) if text else (" ",)
    return any(map(str.isalnum, text)) and not any(end.isalnum() or end.isspace() for end in ends)
