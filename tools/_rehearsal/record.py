"""What is kept of a rehearsed rank: enough to hold every later plan against it, without rehearsing again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from _rehearsal.launch import ROOT
from _rehearsal.planned import Line, last, lines
from _rehearsal.setting import Asked, Setting, setting_of

Record = dict[str, Any]

_PHASES = ("teacher", "train", "sync")
_OF_RANK = ("rank", "stage", "spec", "head_chunk", "pinned", "failure")
_OF_PHASE = ("phase", "allocated", "peak", "reserved_peak", "free", "launches", "flops", "collectives", "waits")


def record_of(asked: Asked, rank: Mapping[str, Any]) -> Record:
    """Return the record of a rank. rank: what `ranks.run` told, with its number."""
    phases = [phase for name in _PHASES if (phase := last(rank, name)) is not None]
    kept = {key: rank[key] for key in _OF_RANK} | {
        "updates": [_counted(update) for update in rank["updates"]],
        "scored": _counted(rank["scored"]),
        "phases": [{key: phase[key] for key in _OF_PHASE} for phase in phases],
    }
    return {"asked": asdict(asked), "rank": kept}


def compared(record: Record) -> list[Line]:
    """Return the present plan beside what was rehearsed; no line if the rank ran out of memory."""
    rank = rank_of(record)
    return [] if rank["failure"] is not None else lines(setting_of_record(record), rank)


def rank_of(record: Record) -> dict[str, Any]:
    """Return what a rank told, as far as it was kept."""
    rank = record["rank"]
    return rank | {"updates": [_each(update) for update in rank["updates"]], "scored": _each(rank["scored"])}


def setting_of_record(record: Record) -> Setting:
    """Return the setting that was rehearsed; recipes are named from the root of the repository."""
    asked = Asked(**record["asked"])
    return setting_of(replace(asked, recipe=str(ROOT / asked.recipe)))


def read_records(path: Path) -> dict[str, Record]:
    """Return the records of a file by name; none if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_records(path: Path, records: Mapping[str, Record]) -> None:
    """Write the records, one a line."""
    rows = (f"{json.dumps(name)}: {json.dumps(record)}" for name, record in records.items())
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def _counted(shapes: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """Return equal neighbours once, as [number, shape]."""
    return [[len(list(same)), shape] for shape, same in groupby(shapes)]


def _each(counted: Sequence[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    def shapes() -> Iterator[dict[str, Any]]:
        for count, shape in counted:
            yield from [shape] * count

    return list(shapes())
