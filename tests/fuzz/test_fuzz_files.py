"""Files of strangers, damaged or made up: read, or refused in one line."""

from __future__ import annotations

import copy
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fuzzing import fuzzed
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import CHAT_TEMPLATE, PROBLEM, byte_tokenizer
from wrong_files import CONFIG, STATE, Reader, config, group, index, manifest, replay, rows, state

from megatron_hdpo.data.prompts import PromptBuilder, PromptConfig
from megatron_hdpo.tracking.metrics import read_metrics
from megatron_hdpo.types.errors import UserError

ROW = {"problem": "q", "answer": 1.5, "solution": "s", "level": "1"}
INDEX = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
MANIFEST = {"files": {"a": {"bytes": 1, "blake2b": "0"}}}
METRICS = {"step": 1, "time": 1.5, "rollout/reward_mean": 0.5}
NUMBERS = [0, -1, 2**31, 2**63, -(2**64), 10**400, 1e-300, 1e300, float("inf"), float("nan"), True, 0.5]
TEXTS = [
    "",
    "nan",
    "1e400",
    "/",
    "..",
    "\ud800",
    "\0",
    "a" * 300,
    "llama3",
    "yarn",
    "<i4",
    "O",
    "step",
    "model.safetensors",
]
PIECES = [
    "{{",
    "}}",
    "{%",
    "%}",
    "for m in messages",
    "endfor",
    "if",
    "endif",
    "m.content",
    "messages[0]",
    "|",
    "*",
    "**",
]
PIECES += [
    "range(9**9)",
    "(",
    ")",
    "1/0",
    "raise_exception('x')",
    "'a'",
    "strftime_now('%d')",
    "set x = 1",
    "generation",
]

scalars = st.one_of(
    st.none(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.integers(), st.floats(), st.text(max_size=5)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
damages = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["cut", "change", "insert"]), st.binary(max_size=4)), max_size=3
)


def read_metrics_file(folder: Path, content: Any) -> object:
    (folder / "metrics.jsonl").write_bytes(content)
    return read_metrics(folder)


JSON_FILES: dict[str, tuple[Reader, Any]] = {
    "config": (config, CONFIG | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
    "index": (index, INDEX),
    "state": (state, STATE | {"memory": {"teacher": {"weights": False}}}),
    "manifest": (manifest, MANIFEST),
    "jsonl": (rows("jsonl"), ROW),
    "json": (rows("json"), [ROW]),
    "csv": (rows("csv"), ROW),
    "parquet": (rows("parquet"), ROW),
    "replay": (replay, group()),
    "metrics": (read_metrics_file, METRICS),
}


def attempt(read: Reader, content: bytes) -> None:
    # Callers of these two make a ValueError one of the user, with the recipe's key or the checkpoint in front.
    expected = (UserError, ValueError) if read in (replay, manifest) else UserError
    with tempfile.TemporaryDirectory() as folder:
        try:
            read(Path(folder), content)
        except expected as error:
            assert "\n" not in str(error), error


def damaged(content: bytes, damage: list[tuple[float, str, bytes]]) -> bytes:
    for place, kind, new in damage:
        at = int(place * len(content))
        rest = {"cut": b"", "change": content[at + len(new) :], "insert": content[at:]}[kind]
        content = content[:at] + new + rest
    return content


def changed(tree: Any, path: list[int], value: Any) -> Any:
    """The tree with the value at a place inside; each number of the path chooses among the keys at its depth."""
    tree = copy.deepcopy(tree)
    section = tree
    for choice in path:
        keys = list(section) if isinstance(section, dict) else list(range(len(section)))
        if not keys:
            break
        key = keys[choice % len(keys)]
        if choice == path[-1] or not isinstance(section[key], dict | list):
            section[key] = value
            break
        section = section[key]
    return tree


def in_its_format(name: str, tree: Any) -> bytes:
    content = json.dumps(tree).encode() + b"\n"
    return gzip.compress(content) if name == "replay" else content


@pytest.mark.parametrize("name", [name for name in JSON_FILES if name not in ("csv", "parquet")])
@fuzzed
@given(path=st.lists(st.integers(0, 20), min_size=1, max_size=5), value=values)
def test_values_of_files(name: str, path: list[int], value: Any) -> None:
    read, tree = JSON_FILES[name]
    attempt(read, in_its_format(name, changed(tree, path, value)))


@pytest.mark.parametrize("name", JSON_FILES)
@fuzzed
@given(damage=damages)
def test_damaged_files(name: str, damage: list[tuple[float, str, bytes]]) -> None:
    read, tree = JSON_FILES[name]
    whole = {"csv": b'problem,answer\n"a,b",1\nc,2\n', "parquet": PARQUET}.get(name) or in_its_format(name, tree)
    attempt(read, damaged(whole, damage))


def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW | {"problem": f"q{i}"} for i in range(20)]), sink)
    return bytes(sink.getvalue())


PARQUET = _parquet()


@fuzzed
@given(pieces=st.lists(st.sampled_from([*PIECES, " "]), max_size=12), whole=st.booleans())
def test_chat_templates(pieces: list[str], whole: bool) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = " ".join(pieces) + (CHAT_TEMPLATE if whole else "")
    try:
        PromptBuilder(tokenizer, PromptConfig()).render_student(PROBLEM)
    except UserError as error:
        assert "\n" not in str(error), error
