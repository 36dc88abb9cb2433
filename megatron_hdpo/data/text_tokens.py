"""Text as token ids, without silence: every character has a token, every token a row of the model's embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from megatron_hdpo.data.plain_text import PlainText, unmarked
from megatron_hdpo.types.errors import DataError

_FOREIGN = "\N{SNOWMAN} \N{HIRAGANA LETTER A} \N{GREEK SMALL LETTER OMEGA} \N{GRINNING FACE}"
"""Characters that only a tokenizer with a token for every byte has all of."""


class NoTokenForText(DataError):
    """A prompt with characters that the tokenizer has no token for, or with a token that the model does not have."""


class TokenizerLike(Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    eos_token_id: int | None
    unk_token_id: int | None
    all_special_tokens: Sequence[str]

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = ...) -> str: ...

    def get_vocab(self) -> dict[str, int]: ...


class TextEncoder:
    """Encoder of text that names what the tokenizer or the model cannot express.

    plain: reads control tokens in marked data as ordinary characters. vocab_size: rows of the model's embedding; None
    where no model is known, and where every token has a row.
    """

    def __init__(self, tokenizer: TokenizerLike, plain: PlainText, vocab_size: int | None = None) -> None:
        self.tokenizer, self.plain = tokenizer, plain
        known = tokenizer.decode(tokenizer.encode(_FOREIGN, add_special_tokens=False))
        self._drops = tokenizer.unk_token_id is None and any(char not in known for char in _FOREIGN.split())
        beyond = vocab_size is not None and max(tokenizer.get_vocab().values(), default=0) >= vocab_size
        self.vocab_size = vocab_size if beyond else None
        self.may_lack_tokens = tokenizer.unk_token_id is not None or self._drops or beyond

    def encode(self, text: str, add_special_tokens: bool) -> np.ndarray:
        """Return the ids int32 [P] of a text. Raises NoTokenForText, and NotEncodable for a control token in data."""
        ids, text = self.plain.ids(text, add_special_tokens), unmarked(text)
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids and self.tokenizer.decode([unknown]) not in text:
            raise NoTokenForText(f"the tokenizer has no token for some characters of this prompt: {text[:200]!r}")
        if self._drops and (lost := self._lost(text)):
            raise NoTokenForText(
                f"the tokenizer has no token for {lost!r} and leaves it out of the prompt {text[:200]!r}"
            )
        if self.vocab_size is not None and ids and max(ids) >= self.vocab_size:
            token = self.tokenizer.decode([max(ids)])
            raise NoTokenForText(
                f"token {max(ids)} ({token!r}) of this prompt is beyond the model's vocabulary of {self.vocab_size}: "
                f"{text[:200]!r}"
            )
        return np.asarray(ids, dtype=np.int32)

    def _lost(self, text: str) -> str | None:
        """Return a character of the text for which the tokenizer gives no token at all."""
        chars = (char for char in dict.fromkeys(text) if not char.isspace())
        return next((char for char in chars if not self.tokenizer.encode(char, add_special_tokens=False)), None)
