"""Rehearse every recipe for GPUs under examples/, at its own layout and on 1,024 ranks: benchmarks/rehearsal.json, .md.

.venv-rehearsal/bin/python tools/bench_rehearsal.py                          # all: about half an hour of one core
.venv-rehearsal/bin/python tools/bench_rehearsal.py qwen2.5-7b --ranks own   # one recipe; keeps the others' results
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _environment  # noqa: F401
from _rehearsal.errors import RehearsalError
from _rehearsal.planned import Line, last
from _rehearsal.report import gib
from _rehearsal.setting import Asked, sampled_ranks, setting_of
from rehearse import rehearse_rank

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks"
MANY = 1024


@dataclass(frozen=True)
class Example:
    """A recipe, its model in the planner's table, and the GPUs that its header names for the trainer."""

    model: str
    gpu: str
    world: int


EXAMPLES = {
    "qwen2.5-math-1.5b": Example("qwen2.5-1.5b", "h100", 8),
    "qwen2.5-7b": Example("qwen2.5-7b", "h100", 16),
    "qwen2.5-32b": Example("qwen2.5-32b", "h100", 32),
    "qwen2.5-72b": Example("qwen2.5-72b", "h100", 64),
    "qwen3-235b-a22b": Example("qwen3-235b-a22b", "h200", 64),
}


def main() -> None:
    """Rehearse, and write both files after each rank, so that an interruption loses nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="EXAMPLE", help=f"default: all of {', '.join(EXAMPLES)}")
    parser.add_argument("--ranks", choices=["own", "many", "both"], default="both", help="own layout, 1,024, or both")
    parser.add_argument("--micro-batches", type=int, default=4, metavar="N", help="of an update, at least; default: 4")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - EXAMPLES.keys():
        parser.error(f"no such example: {', '.join(sorted(unknown))}")
    path = OUT / "rehearsal.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in arguments.names or EXAMPLES:
        for world in _worlds(EXAMPLES[name], arguments.ranks):
            for result in rehearse_example(name, world, arguments.micro_batches):
                results[f"{name}, {world} ranks, rank {result['rank']}"] = result
                path.write_text(json.dumps(results, indent=1) + "\n")
                (OUT / "rehearsal.md").write_text(page(results))


def _worlds(example: Example, which: str) -> list[int]:
    return {"own": [example.world], "many": [MANY], "both": [example.world, MANY]}[which]


def rehearse_example(name: str, world: int, micro_batches: int) -> Iterator[dict[str, Any]]:
    """Yield one result for each kind of rank."""
    example = EXAMPLES[name]
    recipe = f"examples/{name}/hdpo.yaml"
    asked = Asked(str(ROOT / recipe), [], example.gpu, world, example.model, micro_batches)
    setting = setting_of(asked)
    for rank in sampled_ranks(setting.layout):
        began = time.monotonic()
        try:
            found, compared = rehearse_rank(asked, setting, rank)
        except RehearsalError as error:
            print(f"{name}, {world} ranks: {error}", file=sys.stderr, flush=True)
            continue
        print(f"{name}, {world} ranks, rank {rank}: {time.monotonic() - began:.0f} s", flush=True)
        yield summary(name, str(setting.layout), example.gpu, world, rank, found, compared)


def summary(
    name: str, layout: str, gpu: str, world: int, rank: int, found: dict[str, Any], compared: list[Line]
) -> dict[str, Any]:
    """Return what is kept of a rank: memory, launches and waits of a step's training, and the plan beside them."""
    said = {"example": name, "layout": layout, "gpu": gpu, "world": world, "rank": rank, "stage": found["stage"]}
    said |= {"spec": found["spec"], "failure": found["failure"], "lines": [asdict(line) for line in compared]}
    train, sync, start = last(found, "train"), last(found, "sync"), found["phases"][:1]
    if train is None or sync is None or not start:
        return said
    batches = max(1, sum(map(len, found["updates"])))
    told = {"micro_batches": batches, "launches": train["launches"] / batches, "waits": train["device_waits"] / batches}
    told |= {key: train[key] for key in ("allocated", "peak", "reserved_peak", "pinned")}
    return said | told | {"free_after_sync": sync["free"], "places": train["waits"]}


def page(results: dict[str, Any]) -> str:
    """Return the page: one row per rank."""
    head = [
        "# Rehearsal of the examples",
        "",
        "Written by `tools/bench_rehearsal.py`: one rank of each kind, a step cut to a few micro-batches, on the null",
        "GPU ([Rehearsal](../docs/rehearsal.md)). GiB; launches and host waits per micro-batch of training; errors are",
        "those of the plan. The layers are plain torch's, which keep more than Transformer Engine's: a recipe that is",
        "planned with these may run out of memory here.",
        "",
        "| example | layout | GPU | rank | at rest | peak | reserved | plan: rest | plan: peak | collectives exact |"
        " launches | waits | free after sync |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(_row(result) for result in results.values())]) + "\n"


def _row(result: dict[str, Any]) -> str:
    first = [result["example"], result["layout"], result["gpu"], f"{result['rank']} of {result['world']}"]
    if result["failure"] is not None:
        failed = result["failure"]
        return f"| {' | '.join(first)} | runs out of memory in {failed['phase']}: {failed['text']} " + "| " * 8 + "|"
    lines = [Line(**line) for line in result["lines"]]
    errors = {line.what: line.error for line in lines if line.what.startswith("memory")}
    names = {line.what for line in lines if ": " in line.what and line.unit != "FLOP"}
    wrong = {line.what for line in lines if line.what in names and line.planned != line.rehearsed}
    cells = [
        *(gib(result[key]) for key in ("allocated", "peak", "reserved_peak")),
        *(_percent(errors.get(what)) for what in ("memory at rest", "memory, peak of train")),
        f"{len(names) - len(wrong)} of {len(names)}",
        f"{result['launches']:,.0f}",
        f"{result['waits']:,.0f}",
        gib(result["free_after_sync"]),
    ]
    return f"| {' | '.join([*first, *cells])} |"


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:+.1%}"


if __name__ == "__main__":
    main()
