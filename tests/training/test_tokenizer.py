"""Tokenizers of strangers: what ends a response, what the model has no row for, and files that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_tokenizers import byte_tokenizer

from megatron_hdpo.model.config import ModelError
from megatron_hdpo.training.tokenizer import check_tokens, load_tokenizer, stop_token_ids

TOKENIZER = byte_tokenizer()
END, ROWS = TOKENIZER.eos_token_id, len(TOKENIZER.get_vocab())


def no_end():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("tokenizer", "generation", "config", "expected"),
    [
        (TOKENIZER, None, None, (END,)),
        (TOKENIZER, {"eos_token_id": [3, 5]}, {"eos_token_id": 7}, tuple(sorted((3, 5, END)))),
        (TOKENIZER, None, {"eos_token_id": 7}, (END,)),
        (no_end(), {"eos_token_id": 3}, {"eos_token_id": 7}, (3,)),
        (no_end(), None, {"eos_token_id": 7}, (7,)),
        (no_end(), {}, {"eos_token_id": [7, 8]}, (7, 8)),
        (no_end(), None, {"eos_token_id": None}, ()),
        (no_end(), None, None, ()),
    ],
)
def test_end_tokens(tmp_path, tokenizer, generation, config, expected):
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            write(tmp_path, name, content)
    assert stop_token_ids(tokenizer, tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", '{"eos_token_id": ', r"generation_config\.json cannot be read"),
        ("generation_config.json", "[]", r"generation_config\.json cannot be read"),
        ("generation_config.json", "", r"generation_config\.json cannot be read"),
        ("generation_config.json", {"eos_token_id": "x"}, r"eos_token_id is 'x': it must be a token id"),
        ("generation_config.json", {"eos_token_id": [1, "x"]}, r"eos_token_id is 'x': it must be a token id"),
        ("generation_config.json", {"eos_token_id": 1.5}, r"eos_token_id is 1\.5: it must be a token id"),
        ("generation_config.json", {"eos_token_id": True}, r"eos_token_id is True: it must be a token id"),
        ("config.json", {"eos_token_id": {"a": 1}}, r"eos_token_id is \{'a': 1\}: it must be a token id"),
    ],
)
def test_files_without_a_readable_end_token(tmp_path, name, content, message):
    write(tmp_path, name, content)
    with pytest.raises(ModelError, match=message) as refused:
        stop_token_ids(no_end(), tmp_path)
    assert str(refused.value).startswith("model.path: ") and "\n" not in str(refused.value)


def test_no_end_token_is_said():
    assert check_tokens(TOKENIZER, (END,), ROWS, "m") == []
    (warning,) = check_tokens(no_end(), (), ROWS, "m")
    assert "names an end token: every response will run to rollout.max_new_tokens" in warning


def test_an_end_token_that_the_model_lacks_is_refused():
    with pytest.raises(ModelError, match=f"the end token {ROWS} is beyond the model's vocabulary of {ROWS}"):
        check_tokens(TOKENIZER, (END, ROWS), ROWS, "m")
    with pytest.raises(ModelError, match="the end token -1 is beyond"):
        check_tokens(TOKENIZER, (-1,), ROWS, "m")


def test_a_tokenizer_larger_than_the_embedding_is_said():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["zebra", "yak"])
    (warning,) = check_tokens(tokenizer, (END,), ROWS, "m")
    assert f"has 2 tokens that the model's embedding of {ROWS} rows lacks, the first is 'zebra' ({ROWS})" in warning


@pytest.mark.parametrize("content", ['{"version": ', "[]", "{}", '{"model": 3}', ""])
def test_a_damaged_tokenizer_is_one_line(tmp_path, content):
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"^model\.path: .* holds no tokenizer that transformers can load") as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)
