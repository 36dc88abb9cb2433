"""Text of data that spells a control token, as ordinary characters; the template's own control tokens stay tokens.

A tokenizer finds its added tokens wherever their text stands. Here a copy of it knows each control token under another
spelling, with a mark inside. Before a prompt is encoded, the control tokens of the template get that mark, and those of
data do not. So the copy turns the template's into tokens by the tokenizer's own rules, and reads everything else as the
tokenizer would read a text without added tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

from megatron_hdpo.data.control_texts import ControlTexts
from megatron_hdpo.types.errors import DataError

_OF_DATA, _OF_TEMPLATE = "\ufdd0", "\ufdd1"
"""Code points that Unicode keeps for use inside a program: no text has them."""


class NotEncodable(DataError):
    """A text with a control token that this tokenizer cannot read as ordinary characters."""


class PlainText:
    """Encoder of prompts whose data spells control tokens. Stateless but for a copy of the tokenizer, made when needed.

    controls: the texts that must not become tokens in data.
    """

    def __init__(self, tokenizer: Any, controls: ControlTexts) -> None:
        self.tokenizer, self.controls = tokenizer, controls
        self._starts = {text[:size] for text in controls.texts for size in range(1, len(text))}
        self._ends = {text[size:] for text in controls.texts for size in range(1, len(text))}
        self._longest = max(map(len, controls.texts), default=0)

    def can_encode(self, text: str) -> bool:
        """Return whether the tokenizer can read a text of data without any control token."""
        if _OF_DATA in text or _OF_TEMPLATE in text:
            return False
        return self.controls.first(text) is None or (self._copy is not None and self._copy.reads_as_text(text))

    def marked(self, text: str) -> str:
        """Return a text of data with a mark inside every control token, for templates to put into a prompt.

        What could become one together with the text beside it gets a mark at that end. The text stays as it is where
        the tokenizer cannot be copied.
        """
        whole = text
        while self.controls.first(text):
            text = self.controls.sub(lambda found: f"{found[0]}{_OF_DATA}{found[1:]}", text)
        sizes = range(1, min(len(text), self._longest) + 1)
        begins = _OF_DATA if any(text[:size] in self._ends for size in sizes) else ""
        ends = _OF_DATA if any(text[-size:] in self._starts for size in sizes) else ""
        marked = f"{begins}{text}{ends}"
        return whole if marked == whole or self._copy is None else marked

    def ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of a prompt with `marked` texts. Raises NotEncodable."""
        if _OF_DATA not in text or self._copy is None:
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))
        before, after = self._around if add_special_tokens else ([], [])
        return [*before, *self._copy.prompt_ids(text), *after]

    def ids_of_data(self, text: str) -> list[int]:
        """Return the token ids of a text of data alone, without any control token. Raises NotEncodable."""
        if not self.can_encode(text):
            raise NotEncodable(f"the tokenizer cannot read it as ordinary characters: {text[:200]!r}")
        return self.ids(self.marked(text) if self.controls.first(text) else text)

    @cached_property
    def _copy(self) -> _MarkedCopy | None:
        """The copy with marked control tokens; None for a tokenizer that cannot be copied, or whose copy differs."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            return None
        try:
            copy = _MarkedCopy(backend, self.controls)
        except Exception:  # tokenizers raises plain Exception, for parts that are written in Python
            return None
        return copy if self._agrees(copy) else None

    def _agrees(self, copy: _MarkedCopy) -> bool:
        """Return whether the copy reads the control tokens of a template as the tokenizer does."""
        probe = "\n".join(f"one {text}two\n{text} 3{text}" for text in self.controls.texts)
        try:
            return copy.prompt_ids(probe) == list(self.tokenizer.encode(probe, add_special_tokens=False))
        except NotEncodable:
            return False

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """Return the ids that the tokenizer puts before and after a text. Raises NotEncodable where it changes it."""
        bare, whole = (list(self.tokenizer.encode("a", add_special_tokens=special)) for special in (False, True))
        places = (place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
        if (start := next(places, None)) is None:
            raise NotEncodable("this tokenizer reads a text in another way when it adds special tokens")
        return whole[:start], whole[start + len(bare) :]


def unmarked(text: str) -> str:
    """Return a prompt without the marks of `PlainText.marked`."""
    return text.replace(_OF_DATA, "")


def without_marks_of_its_own(text: str) -> str:
    """Return a text that somebody else wrote without the code points that mark control tokens."""
    return text.replace(_OF_DATA, "").replace(_OF_TEMPLATE, "")


class _MarkedCopy:
    """A fast tokenizer whose control tokens are spelled with a mark inside."""

    def __init__(self, backend: Tokenizer, controls: ControlTexts) -> None:
        description = json.loads(backend.to_str())
        added = description["added_tokens"]
        self._real_id = {token["content"]: token["id"] for token in added}
        for token in added:
            if token["content"] in controls.texts:
                token["content"] = _marked(token["content"])
        self._controls = controls
        self._copy = Tokenizer.from_str(json.dumps(description | {"truncation": None, "padding": None}))
        # The copy numbers its added tokens anew.
        self._real = {self._copy.token_to_id(token["content"]): token["id"] for token in added}
        self._marked_ids = {self._copy.token_to_id(_marked(text)) for text in controls.texts}
        self._control_ids = {self._real_id[text] for text in controls.texts if text in self._real_id}

    def reads_as_text(self, text: str) -> bool:
        """Return whether a text has no control token."""
        return self._control_ids.isdisjoint(self._real_ids(self._encoded(text)))

    def prompt_ids(self, text: str) -> list[int]:
        """Return the ids of a prompt in which the control tokens of data are marked. Raises NotEncodable."""
        pieces = self._controls.split(text)
        marked = "".join(chain.from_iterable((plain, _marked(control)) for plain, control in pieces))
        ids = self._encoded(unmarked(marked))
        others = self._real_ids([token for token in ids if token not in self._marked_ids])
        tokens = sum(1 for _, control in pieces if control)
        if len(ids) - len(others) != tokens or not self._control_ids.isdisjoint(others):
            raise NotEncodable(f"this tokenizer makes control tokens of ordinary text: {unmarked(text)[:200]!r}")
        return self._real_ids(ids)

    def _real_ids(self, ids: Sequence[int]) -> list[int]:
        """Return the tokenizer's ids of tokens of the copy."""
        return [self._real.get(token, token) for token in ids]

    def _encoded(self, text: str) -> Sequence[int]:
        return self._copy.encode(text, add_special_tokens=False).ids


def _marked(control: str) -> str:
    return f"{control[0]}{_OF_TEMPLATE}{control[1:]}" if control else ""
