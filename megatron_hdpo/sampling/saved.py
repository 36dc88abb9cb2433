"""Saved rollouts: readable JSON lines from which the trainer can replay a step without an engine.

One line per group. Fields for the reader come first: question, prompts and responses as text, rewards, finish reasons,
level, counts of dropped samples. `replay` at the end holds the arrays as base64 of their little-endian bytes, so that
every float32 is restored bit by bit.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, Group, Sample, TopKArrays

FORMAT = 1
Decode = Callable[[np.ndarray], str]
_log = logging.getLogger(__name__)


def write_groups(path: str | Path, groups: Iterable[Group], decode: Decode) -> None:
    """Append one line per group; decode turns prompt ids into text (for the reader only, ids are replayed).

    All lines are written at once, after all groups were encoded: a group that cannot be written (ValueError: a reward
    is not a finite number) leaves the file unchanged. One process per file. Metadata of a problem that JSON cannot hold
    is left out, and its keys are listed under `metadata_left_out`.
    """
    lines = [json.dumps(_encode_group(g, decode), ensure_ascii=False, allow_nan=False) + "\n" for g in groups]
    if not lines:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A killed writer may have left half a line: start a new one, so that our first line can be read.
    text = ("\n" if _ends_amid_a_line(path) else "") + "".join(lines)
    with path.open("ab") as file:
        file.write(text.encode())


def read_groups(path: str | Path, skip_broken: bool = False) -> list[Group]:
    """Return the groups of a file, equal to those written.

    Raises ValueError with file, line number and reason at a line that cannot be read; with skip_broken the line is
    skipped with a warning.
    """
    groups = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                groups.append(_decode_line(line))
            except ValueError as error:
                message = f"{path}:{number}: {error}"
                if not skip_broken:
                    raise ValueError(f"{message}; remove the line, or read with skip_broken=True") from error
                _log.warning("%s; skipped", message)
    return groups


def _ends_amid_a_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def _encode_group(group: Group, decode: Decode) -> dict[str, Any]:
    problem, privileged_ids = group.problem, group.privileged_prompt_ids
    metadata, left_out = _json_part(problem.metadata)
    return {
        "format": FORMAT,
        "id": problem.id,
        "task": problem.task,
        "level": problem.level,
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
    if not np.isfinite(sample.reward):
        raise ValueError(f"problem {problem_id}: reward {sample.reward} is not a finite number, so it is not saved")
    return {
        "reward": float(sample.reward),
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
    array = np.frombuffer(data, dtype=np.dtype(packed["dtype"])).reshape(packed["shape"])
    return array.astype(array.dtype.newbyteorder("="))  # a copy: frombuffer's array cannot be written to


def _decode_line(line: bytes) -> Group:
    try:
        record = json.loads(line)
    except ValueError as error:
        cut = "" if line.endswith(b"\n") else ", the file ends here (a writer that was stopped?)"
        raise ValueError(f"broken line{cut}: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"not a group of rollouts in format {FORMAT}")
    try:
        return _decode_group(record)
    except KeyError as error:
        raise ValueError(f"key {error} is missing") from error
    except TypeError as error:
        raise ValueError(f"a value has the wrong type: {error}") from error


def _decode_group(record: dict[str, Any]) -> Group:
    names = ("id", "task", "question", "answer", "solution", "level", "metadata")
    replay = record["replay"]
    privileged_ids = replay["privileged_prompt_ids"]
    return Group(
        problem=Problem(**{name: record[name] for name in names}),
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
        )
        for text, packed in zip(texts, arrays, strict=True)
    ]


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
