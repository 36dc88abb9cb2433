"""Saved rollouts: readable JSON lines from which the trainer can replay a step without an engine.

One line per group, in one compressed file per step and rank that sampled: rollouts/step_00000001.rank_00000.jsonl.gz.
Fields for the reader come first: question, prompts and responses as text, rewards, finish reasons, level, counts of
dropped samples. `replay` at the end holds the arrays as base64 of their little-endian bytes, so that every float32 is
restored bit by bit. Older runs have one file per step, step_00000001.jsonl, whose lines are in the order of the groups.
"""

from __future__ import annotations

import base64
import gzip
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, Group, Sample, TopKArrays

FORMAT = 1
Decode = Callable[[np.ndarray], str]
_COMPRESSION = 1
"""The level of gzip. Most bytes are base64 of token ids and log-probs, which higher levels hardly make smaller."""

_DTYPES = frozenset({"<i4", "<i8", "<f4", "<f8", "|u1", "<u2", "<u4"})
"""Types of arrays in saved rollouts, as numpy writes them."""
_NAME = re.compile(r"step_(\d+)(\.rank_\d+)?\.jsonl(\.gz)?")
_log = logging.getLogger(__name__)


def step_file(step: int, rank: int) -> str:
    """Return the name of the file with the groups of a step, counted from 1, that a rank sampled."""
    return f"step_{step:08d}.rank_{rank:05d}.jsonl.gz"


def step_of(path: Path) -> int:
    """Return the step of a file with saved rollouts."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def all_files(folder: Path) -> list[Path]:
    """Return the files of a folder that hold saved rollouts, by step and rank; none of a folder that is not there."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=lambda p: (step_of(p), p.name))


def step_files(folder: Path, step: int) -> list[Path]:
    """Return the files that hold the rollouts of a step, counted from 1."""
    return [path for path in all_files(folder) if step_of(path) == step]


def open_lines(path: Path) -> IO[bytes]:
    """Open a file of saved rollouts, compressed or not, for reading."""
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def write_groups(path: Path, groups: Mapping[int, Group], of: int, decode: Decode) -> None:
    """Write a compressed file with one line per group, over an earlier file of this name.

    groups: by their index among the `of` groups of the step. decode turns prompt ids into text (for the reader only,
    ids are replayed). If a group cannot be written (ValueError: a reward is not a finite number) or the disk is full,
    there is no new file. Metadata of a problem that JSON cannot hold is left out, and its keys are listed under
    `metadata_left_out`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with gzip.open(partial, "wt", compresslevel=_COMPRESSION, encoding="utf-8", newline="\n") as file:
            for index, group in sorted(groups.items()):
                record = _encode_group(group, {"group": index, "of": of}, decode)
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_groups(path: Path, skip_broken: bool = False) -> list[Group]:
    """Return the groups of a file, equal to those written.

    Raises ValueError with file, line number and reason at a line that cannot be read; with skip_broken the line is
    skipped with a warning.
    """
    groups = []
    for where, line in _lines([path]):
        try:
            groups.append(_decode_group(_record(line)))
        except ValueError as error:
            message = f"{where}: {error}"
            if not skip_broken:
                raise ValueError(f"{message}; remove the line, or read with skip_broken=True") from error
            _log.warning("%s; skipped", message)
    return groups


def read_step(folder: Path, step: int) -> list[Group]:
    """Return the groups of a step, counted from 1, in their order. Errors as in `read_share`."""
    groups = read_share(step_files(folder, step), share=0, shares=1)
    return [group for _, group in sorted(groups.items())]


def read_share(files: Sequence[Path], share: int, shares: int) -> dict[int, Group]:
    """Return every `shares`-th group of a step's files, from the one with number `share` on, by index in the step.

    Raises ValueError, with file and line, when a line cannot be read or the files do not hold the whole step.
    """
    groups: dict[int, Group] = {}
    lines, told = 0, set[int]()
    for where, line in _lines(files):
        if lines % shares == share:
            try:
                record = _record(line)
                groups[_whole(record, "group", lines)] = _decode_group(record)
                told |= {_whole(record, "of", 0)} if "of" in record else set()  # older files do not say it
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        lines += 1
    if not lines:
        raise ValueError(f"{files[0].parent}: the files of step {step_of(files[0])} hold no rollouts")
    if wrong := told - {lines}:
        raise ValueError(
            f"{files[0].parent}: step {step_of(files[0])} has {max(wrong)} groups, but its files {lines}: the file of "
            "a rank is missing, or is of another run"
        )
    return groups


def _lines(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield the lines that are not empty, each with its file and number."""
    for path in files:
        with open_lines(path) as file:
            try:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"{path}:{number}", line
            except EOFError as error:
                raise ValueError(f"{path}: the compressed file ends too early") from error
            except (gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path}: the compressed file is damaged: {error}") from error


def _encode_group(group: Group, place: Mapping[str, int], decode: Decode) -> dict[str, Any]:
    problem, privileged_ids = group.problem, group.privileged_prompt_ids
    metadata, left_out = _json_part(problem.metadata)
    return {
        "format": FORMAT,
        **place,
        "id": problem.id,
        "task": problem.task,
        "level": problem.level,
        "source": problem.source,
        "question": problem.question,
        "answer": problem.answer,
        "solution": problem.solution,
        "dropped": group.dropped,
        "prompt": decode(group.prompt_ids),
        "samples": [sample_record(s, problem.id) for s in group.samples],
        "privileged_prompt": None if privileged_ids is None else decode(privileged_ids),
        "privileged": [sample_record(s, problem.id) for s in group.privileged_samples],
        "metadata": metadata,
        "metadata_left_out": left_out,
        "replay": {
            "prompt_ids": _pack(group.prompt_ids),
            "privileged_prompt_ids": None if privileged_ids is None else _pack(privileged_ids),
            "samples": [_encode_completion(s.completion) for s in group.samples],
            "privileged": [_encode_completion(s.completion) for s in group.privileged_samples],
        },
    }


def sample_record(sample: Sample, problem_id: str) -> dict[str, Any]:
    """Return the readable part of a judged sample. Raises ValueError on a reward that is not a finite number."""
    for reward in (sample.reward, *sample.components.values()):
        if not np.isfinite(reward):
            raise ValueError(f"problem {problem_id}: reward {reward} is not a finite number, so it is not saved")
    parts = {"components": dict(sample.components), "decided_by": sample.decided_by} if sample.components else {}
    return {
        "reward": float(sample.reward),
        **parts,
        "finish_reason": sample.completion.finish_reason,
        "tokens": sample.length,
        "text": sample.text,
    } | ({} if sample.feedback is None else {"feedback": sample.feedback})


def _encode_completion(completion: Completion) -> dict[str, Any]:
    tops = completion.top_logprobs
    return {
        "token_ids": _pack(completion.token_ids),
        "logprobs": _pack(completion.logprobs),
        "weight_versions": _pack(completion.weight_versions),
        "top_ids": None if tops is None else _pack(tops.ids_TK),
        "top_logprobs": None if tops is None else _pack(tops.logprobs_TK),
    } | ({} if completion.routed_experts is None else {"routed_experts": _pack(completion.routed_experts)})


def _json_part(metadata: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the part of a dictionary that survives JSON unchanged, and the keys of the rest."""
    kept, left_out = {}, []
    for key, value in metadata.items():
        try:
            same = bool(json.loads(json.dumps({key: value}, allow_nan=False)) == {key: value})
        except (TypeError, ValueError):
            same = False
        if same:
            kept[key] = value
        else:
            left_out.append(str(key))
    return kept, left_out


def _pack(array: np.ndarray) -> dict[str, Any]:
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return {
        "dtype": little.dtype.str,
        "shape": list(array.shape),
        "base64": base64.b64encode(little.tobytes()).decode("ascii"),
    }


def _unpack(packed: dict[str, Any]) -> np.ndarray:
    data = base64.b64decode(packed["base64"], validate=True)
    if packed["dtype"] not in _DTYPES:
        raise ValueError(f"an array has the type {packed['dtype']!r}, which no rollouts have")
    array = np.frombuffer(data, dtype=np.dtype(packed["dtype"])).reshape(packed["shape"])
    return array.astype(array.dtype.newbyteorder("="))  # a copy: frombuffer's array cannot be written to


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError("broken line: nested too deep") from error
    except ValueError as error:
        cut = "" if line.endswith(b"\n") else ", the file ends here (a writer that was stopped?)"
        raise ValueError(f"broken line{cut}: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"not a group of rollouts in format {FORMAT}")
    return record


def _decode_group(record: Mapping[str, Any]) -> Group:
    try:
        return _group(record)
    except KeyError as error:
        raise ValueError(f"key {error} is missing") from error
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"a value has the wrong type: {error}") from error


def _whole(record: Mapping[str, Any], key: str, default: int) -> int:
    value = record.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} is {str(value)[:40]!r}, not a whole number")
    return value


def _group(record: Mapping[str, Any]) -> Group:
    names = ("id", "task", "question", "answer", "solution", "level", "metadata")
    texts = {name: record[name] for name in names[:4]}
    if wrong := next((name for name, text in texts.items() if not isinstance(text, str)), None):
        raise ValueError(f"{wrong} is {type(record[wrong]).__name__}, not text")
    replay = record["replay"]
    privileged_ids = replay["privileged_prompt_ids"]
    return Group(
        problem=Problem(**{name: record[name] for name in names}, source=record.get("source")),
        prompt_ids=_unpack(replay["prompt_ids"]),
        samples=_decode_samples(record["samples"], replay["samples"]),
        privileged_prompt_ids=None if privileged_ids is None else _unpack(privileged_ids),
        privileged_samples=_decode_samples(record["privileged"], replay["privileged"]),
        dropped=dict(record["dropped"]),
    )


def _decode_samples(texts: list[dict[str, Any]], arrays: list[dict[str, Any]]) -> list[Sample]:
    if len(texts) != len(arrays):
        raise ValueError(f"{len(texts)} samples but arrays for {len(arrays)}")
    return [
        Sample(
            _decode_completion(packed, text["finish_reason"]),
            text["text"],
            float(text["reward"]),
            text.get("feedback"),
            *_components(text),
        )
        for text, packed in zip(texts, arrays, strict=True)
    ]


def _components(text: Mapping[str, Any]) -> tuple[dict[str, float], str]:
    """Return the values of the reward functions and the name of the one that decides; ({}, "") of older rollouts."""
    components, decided_by = text.get("components", {}), text.get("decided_by", "")
    if decided_by and decided_by not in components:
        raise ValueError(f"decided_by is {str(decided_by)[:40]!r}, which is none of the components")
    return {name: float(value) for name, value in components.items()}, decided_by


def _decode_completion(packed: dict[str, Any], finish_reason: str) -> Completion:
    if finish_reason not in ("stop", "length"):
        raise ValueError(f"finish_reason {finish_reason!r} is neither stop nor length")
    tops = None
    if packed["top_ids"] is not None:
        tops = TopKArrays(_unpack(packed["top_ids"]), _unpack(packed["top_logprobs"]))
    completion = Completion(
        token_ids=_unpack(packed["token_ids"]),
        logprobs=_unpack(packed["logprobs"]),
        finish_reason=finish_reason,  # type: ignore[arg-type]  # checked above
        weight_versions=_unpack(packed["weight_versions"]),
        top_logprobs=tops,
        routed_experts=_unpack(packed["routed_experts"]) if "routed_experts" in packed else None,
    )
    lengths = {len(completion.token_ids), len(completion.logprobs), len(completion.weight_versions)}
    lengths |= {len(tops.ids_TK), len(tops.logprobs_TK)} if tops else set()
    if len(lengths) != 1:
        raise ValueError(f"arrays of one completion have different lengths {sorted(lengths)}")
    return completion
