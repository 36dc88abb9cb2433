"""Files as strangers leave them: a reader for each kind of file, and the message of each kind of damage."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hdpo.checkpoint.manifest import MANIFEST, problems_of
from megatron_hdpo.checkpoint.store import read_state
from megatron_hdpo.data.tasks import CsvTask, JsonlTask, JsonTask, ParquetTask
from megatron_hdpo.model.architecture import read_architecture
from megatron_hdpo.sampling.replay_check import check_replayed
from megatron_hdpo.sampling.saved import read_share
from megatron_hdpo.tracking.report import write_report
from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.weights.hf_files import INDEX_FILE, HfWeights

Content = str | bytes | dict[str, Any] | list[Any]
Reader = Callable[[Path, Content], object]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
STATE = {"step": 2, "tensor_parallel": 1, "pipeline_parallel": 1, "architecture": {}}


def put(path: Path, content: Content) -> Path:
    """Write text, bytes, or a value as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict | list):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def config(folder: Path, content: Content) -> object:
    """A config.json: a whole one with these changes, or this text."""
    put(folder / "config.json", CONFIG | content if isinstance(content, dict) else content)
    return read_architecture(folder)


def index(folder: Path, content: Content) -> object:
    """An index of safetensors without any of its files."""
    put(folder / INDEX_FILE, content)
    with HfWeights(folder) as weights:
        return weights.names


def rows(kind: str) -> Reader:
    """A reader of problems from a file of this kind."""
    tasks: dict[str, Any] = {"jsonl": JsonlTask, "json": JsonTask, "csv": CsvTask, "parquet": ParquetTask}

    def read(folder: Path, content: Content) -> object:
        return tasks[kind](kind=kind, path=put(folder / f"rows.{kind}", content)).problems(LoadReport())

    return read


def packed(values: list[Any], dtype: str) -> dict[str, Any]:
    """An array as saved rollouts hold it."""
    array = np.array(values, dtype)
    return {"dtype": dtype, "shape": list(array.shape), "base64": base64.b64encode(array.tobytes()).decode()}


def group(**changes: Any) -> dict[str, Any]:
    """A line of saved rollouts; a change names a key, or keys joined by two underscores."""
    completion = {
        "token_ids": packed([5, 6], "<i4"),
        "logprobs": packed([-0.5, -1.0], "<f4"),
        "weight_versions": packed([0, 0], "<i4"),
        "top_ids": None,
        "top_logprobs": None,
    }
    line: dict[str, Any] = {"format": 1, "group": 0, "of": 1, "id": "t/1", "task": "t", "level": None}
    line |= {"question": "q", "answer": "1", "solution": None, "dropped": {}, "metadata": {}, "privileged": []}
    line |= {"samples": [{"reward": 1.0, "finish_reason": "stop", "tokens": 2, "text": "x"}], "privileged_prompt": None}
    line["replay"] = {"prompt_ids": packed([1, 2], "<i4"), "privileged_prompt_ids": None, "privileged": []}
    line["replay"]["samples"] = [completion]
    for path, value in changes.items():
        *parents, last = path.split("__")
        section: Any = line
        for part in parents:
            section = section[int(part)] if isinstance(section, list) else section[part]
        section[last] = value
    return line


def replay(folder: Path, content: Content) -> object:
    """Rollouts of step 1, replayed by a model with 64 tokens; bytes are the compressed file."""
    path = folder / "step_00000001.rank_00000.jsonl.gz"
    if isinstance(content, dict):
        content = json.dumps(content) + "\n"
    put(path, content if isinstance(content, bytes) else gzip.compress(str(content).encode()))
    for found in (groups := read_share([path], 0, 1)).values():
        check_replayed(found, 64, "replay")
    return groups


def state(folder: Path, content: Content) -> object:
    """A run_state.json: a whole one with these changes, or this text."""
    put(folder / "step_00000002" / "run_state.json", STATE | content if isinstance(content, dict) else content)
    return read_state(folder / "step_00000002")


def manifest(folder: Path, content: Content) -> object:
    """The manifest of a checkpoint; what is wrong is returned, and raised here."""
    put(folder / MANIFEST, content)
    if problems := problems_of(folder, full=True):
        raise ValueError("; ".join(problems))
    return problems


def metrics(folder: Path, content: Content) -> object:
    """A metrics.jsonl, of which a report is made."""
    put(folder / "metrics.jsonl", content)
    return write_report(folder)
