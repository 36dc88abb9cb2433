"""The run's own record: `metrics.jsonl`, one JSON object per step, always written.

A line is `{"step": 12, "time": 1767225600.0, "rollout/reward_mean": 0.25, ...}`; `time` is Unix seconds.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hdpo.types.errors import UserError

METRICS_FILE = "metrics.jsonl"
SUPERSEDED_FILE = "metrics.superseded.jsonl"

_TOO_LARGE = 10**300
_NAME = re.compile(r"[a-z0-9_]+(/[A-Za-z0-9_@.%+:=-]+)+")
_log = logging.getLogger(__name__)


class MetricsFileError(UserError, ValueError):
    """A line of metrics.jsonl that this module did not write; the message names file and line."""


def check_name(name: str) -> None:
    """Raise ValueError unless `name` reads `room/name` (`rollout/reward_mean`, `eval/gsm/pass@4`)."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"metric name {name!r}: expected room/name, such as rollout/reward_mean or eval/pass@1")


def as_number(name: str, value: Any) -> float | int:
    """Return `value`, which may be a scalar of numpy or torch, as a Python number.

    Raises TypeError, naming the metric, on anything else.
    """
    if isinstance(value, bool | int):
        return int(value)
    if hasattr(value, "item") and not isinstance(value, float):
        if math.prod(getattr(value, "shape", ())) != 1:
            raise TypeError(f"metric {name}: one number expected, got an array of shape {tuple(value.shape)}")
        value = value.item()
    if not isinstance(value, bool | int | float):
        raise TypeError(f"metric {name}: a number expected, got {type(value).__name__} {value!r}")
    return value


def clean(metrics: Mapping[str, Any]) -> dict[str, float | int]:
    """Return the metrics as Python numbers, with checked names; NaN and infinities are kept."""
    for name in metrics:
        check_name(name)
    return {name: as_number(name, value) for name, value in metrics.items()}


class MetricsWriter:
    """Writer of `<output_dir>/metrics.jsonl`: one line per step, in rising order of steps.

    resume_step: the last step in the restored checkpoint; lines of later steps came from a run whose weights are lost,
    so they move to `metrics.superseded.jsonl`. None: a fresh start, and all earlier lines move. A second write for the
    last step is merged into its line (an evaluation may come after the step's own numbers). `nonfinite` counts, by
    metric, the NaN and infinities that were written as null.
    """

    def __init__(self, output_dir: str | os.PathLike[str], resume_step: int | None = None) -> None:
        self.path = Path(output_dir) / METRICS_FILE
        self.nonfinite: Counter[str] = Counter()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._last: dict[str, Any] | None = _keep_until(self.path, resume_step)
        self._fd: int | None = _open_append(self.path)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of `step`; they are in the file when this returns.

        Raises ValueError on a malformed name or on a step before the last one, TypeError on a value that is no number.
        """
        if self._fd is None:
            raise ValueError(f"{self.path}: written to after close()")
        last_step = None if self._last is None else self._last["step"]
        if last_step is not None and step < last_step:
            raise ValueError(f"{self.path}: step {step} after step {last_step}; to go back, open with resume_step")
        numbers = {name: self._finite(name, value) for name, value in clean(metrics).items()}
        record = {"step": int(step), "time": round(time.time(), 3), **numbers}
        if step == last_step:
            record = {**(self._last or {}), **numbers}
            self._replace_last_line(_line(record))
        else:
            _write_all(self._fd, _line(record), self.path)
        self._last = record

    def _finite(self, name: str, value: float | int) -> float | int | None:
        if math.isfinite(value):
            return value
        self.nonfinite[name] += 1
        count = self.nonfinite[name]
        if math.log10(count).is_integer():  # the 1st, 10th, 100th ...: a diverged run must not fill its log
            _log.warning("metric %s is %s, written as null (%d so far)", name, value, count)
        return None

    def _replace_last_line(self, line: bytes) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        _replace(self.path, b"".join(lines[:-1]) + line)
        self.close()  # the descriptor still points at the file that was replaced
        self._fd = _open_append(self.path)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the steps of a metrics.jsonl (or of the run folder that holds one), in order; null becomes None.

    A last line without its line feed is incomplete (being written, or cut when the run died) and is left out. Raises
    FileNotFoundError, and MetricsFileError on a line that is no step or whose step does not rise.
    """
    file = Path(path)
    if file.is_dir():
        file = file / METRICS_FILE
    records: list[dict[str, Any]] = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        record = _parse(line, file, number)
        if records and record["step"] <= records[-1]["step"]:
            raise MetricsFileError(
                f"{file}, line {number}: step {record['step']} after step {records[-1]['step']}; "
                "two runs wrote this file at once? Keep the lines of one of them"
            )
        records.append(record)
    return records


def _parse(line: bytes, file: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MetricsFileError(f"{file}, line {number}: not JSON ({error}); remove or repair the line") from error
    if not isinstance(record, dict) or not _is_number(record.get("step"), int):
        raise MetricsFileError(
            f"{file}, line {number}: no JSON object with an integer `step`; remove or repair the line"
        )
    if wrong := next((name for name, value in record.items() if not _is_number(value, int | float | None)), None):
        raise MetricsFileError(
            f"{file}, line {number}: {wrong} is {str(record[wrong])[:40]!r}, not a number; remove or repair the line"
        )
    return record


def _is_number(value: Any, kinds: Any) -> bool:
    """Return whether a value of JSON has one of these types, is not true or false, and fits a float."""
    return isinstance(value, kinds) and not isinstance(value, bool) and (value is None or abs(value) < _TOO_LARGE)


def _keep_until(path: Path, resume_step: int | None) -> dict[str, Any] | None:
    """Move lines that a resumed run will write again (and an incomplete one) aside; return the last kept record."""
    if not path.exists():
        return None
    records = read_metrics(path)
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [] if resume_step is None else [record for record in records if record["step"] <= resume_step]
    moved = lines[len(kept) :]
    if moved:
        aside = b"".join(line if line.endswith(b"\n") else line + b"\n" for line in moved)
        with open(path.with_name(SUPERSEDED_FILE), "ab") as file:
            file.write(aside)
            file.flush()
            os.fsync(file.fileno())
        _replace(path, b"".join(lines[: len(kept)]))
        _log.info("%s: %d lines after step %s moved to %s", path, len(moved), resume_step, SUPERSEDED_FILE)
    return kept[-1] if kept else None


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, allow_nan=False) + "\n").encode()


def _open_append(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def _write_all(fd: int, data: bytes, path: Path) -> None:
    # One write call per line, unbuffered: a reader or a killed run sees the whole line or none of it.
    written = os.write(fd, data)
    if written != len(data):
        os.ftruncate(fd, os.fstat(fd).st_size - written)
        raise OSError(f"{path}: {written} of {len(data)} bytes written; is the disk full?")


def _replace(path: Path, content: bytes) -> None:
    # A new file and a rename: a crash in between leaves the old content or the new one, never half of it.
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
