"""The tokenizer of a model folder: loaded, and compared with the model before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from transformers import AutoTokenizer, GenerationConfig

from megatron_hdpo.data.text_tokens import TokenizerLike
from megatron_hdpo.model.config import ModelError
from megatron_hdpo.sampling.response_text import Decoder

_GENERATION = "generation_config.json"


class Tokenizer(TokenizerLike, Decoder, Protocol):
    """What a run needs of a Hugging Face tokenizer."""

    def convert_ids_to_tokens(self, ids: int) -> str: ...


def load_tokenizer(path: str | Path, key: str = "model.path") -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder.

    key: the recipe key that names the folder, for the message. Raises ModelError when transformers cannot load one.
    """
    try:
        # transformers says that `decode` may return a list, which it does for several texts at once only.
        return cast(Tokenizer, AutoTokenizer.from_pretrained(path))
    except Exception as error:  # transformers, tokenizers (which raises plain Exception) and json have their own
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "it comes with code of its own, which this package does not run"
        raise ModelError(f"{key}: {path} holds no tokenizer that transformers can load: {reason}") from error


def stop_token_ids(tokenizer: TokenizerLike, model_path: str | Path) -> tuple[int, ...]:
    """Return the tokens that end a response: the tokenizer's end of sequence and those of generation_config.json.

    Where neither names one, those of config.json, as transformers does. Raises ModelError for files that cannot be
    read.
    """
    folder = Path(model_path)
    ids = {*_ids(tokenizer.eos_token_id, "the tokenizer's eos_token_id")}
    if (folder / _GENERATION).is_file():
        ids |= {*_ids(_generation_config(folder).eos_token_id, f"{folder / _GENERATION}: eos_token_id")}
    if not ids and (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        ids |= {*_ids(config.get("eos_token_id"), f"{folder / 'config.json'}: eos_token_id")}
    return tuple(sorted(ids))


def check_tokens(tokenizer: TokenizerLike, stop_ids: tuple[int, ...], vocab_size: int, path: str | Path) -> list[str]:
    """Return warnings about tokens that the model does not have, and about responses that nothing ends.

    vocab_size: rows of the model's embedding. Raises ModelError for an end token that the model does not have.
    """
    if beyond := [token for token in stop_ids if not 0 <= token < vocab_size]:
        raise ModelError(
            f"model.path: {path}: the end token {beyond[0]} is beyond the model's vocabulary of {vocab_size}, so no "
            "response could ever end with it: correct eos_token_id of its tokenizer or generation_config.json"
        )
    return list(_warnings(tokenizer, stop_ids, vocab_size, path))


def _warnings(tokenizer: TokenizerLike, stop_ids: tuple[int, ...], vocab_size: int, path: str | Path) -> Iterator[str]:
    if not stop_ids:
        yield (
            f"model.path: neither the tokenizer nor generation_config.json nor config.json of {path} names an end "
            "token: every response will run to rollout.max_new_tokens"
        )
    if beyond := sorted((index, text) for text, index in tokenizer.get_vocab().items() if index >= vocab_size):
        yield (
            f"model.path: the tokenizer of {path} has {len(beyond)} tokens that the model's embedding of {vocab_size} "
            f"rows lacks, the first is {beyond[0][1]!r} ({beyond[0][0]}): problems whose prompts hold one are refused"
        )


def _generation_config(folder: Path) -> Any:
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises OSError for JSON, and what Python raises for wrong types
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model.path: {folder / _GENERATION} cannot be read: {reason}") from error


def _ids(value: Any, name: str) -> list[int]:
    """Return one id, several or none as a list. Raises ModelError for what is no id."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if wrong := [item for item in ids if isinstance(item, bool) or not isinstance(item, int)]:
        raise ModelError(f"model.path: {name} is {wrong[0]!r}: it must be a token id, or a list of them")
    return ids
