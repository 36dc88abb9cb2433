"""Rehearse the recipes for GPUs under examples/, other layouts and points of the scaling study: benchmarks/rehearsal.*.

.venv-rehearsal/bin/python tools/bench_rehearsal.py                          # all: an hour of one core
.venv-rehearsal/bin/python tools/bench_rehearsal.py qwen2.5-7b --ranks own   # one recipe; keeps the others' results
.venv-rehearsal/bin/python tools/bench_rehearsal.py --page                   # only the page, with the present plan
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import _environment  # noqa: F401
from _rehearsal.errors import RehearsalError
from _rehearsal.launch import ROOT
from _rehearsal.planned import last
from _rehearsal.record import Record, compared, rank_of, read_records, record_of, setting_of_record, write_records
from _rehearsal.report import gib
from _rehearsal.setting import Asked, sampled_ranks
from rehearse import rehearse_rank

RECORDS = ROOT / "benchmarks" / "rehearsal.json"
PAGE = ROOT / "benchmarks" / "rehearsal.md"
MANY = 1024


@dataclass(frozen=True)
class Case:
    """A recipe on some GPUs.

    model: in the planner's table. gpus: the first is the one that the recipe's header names; on others it is rehearsed
    beside it. worlds: numbers of ranks. overrides, guesses: as of `Asked`.
    """

    recipe: str
    model: str
    gpus: tuple[str, ...]
    worlds: tuple[int, ...]
    overrides: tuple[str, ...] = ()
    guesses: dict[str, int] = field(default_factory=dict)


def _example(name: str, model: str, gpus: tuple[str, ...], world: int) -> Case:
    return Case(f"examples/{name}/hdpo.yaml", model, gpus, (world, MANY))


EXAMPLES = {
    "qwen2.5-math-1.5b": _example("qwen2.5-math-1.5b", "qwen2.5-1.5b", ("h100",), 8),
    # Planned with Transformer Engine's layers; with plain torch's it runs out of an H100's memory.
    "qwen2.5-7b": _example("qwen2.5-7b", "qwen2.5-7b", ("h100", "h200"), 16),
    "qwen2.5-32b": _example("qwen2.5-32b", "qwen2.5-32b", ("h100",), 32),
    "qwen2.5-72b": _example("qwen2.5-72b", "qwen2.5-72b", ("h100",), 64),
    "qwen3-235b-a22b": _example("qwen3-235b-a22b", "qwen3-235b-a22b", ("h200",), 64),
}


def _on_h200(recipe: str, model: str, world: int, layout: str, *more: str) -> Case:
    return Case(f"examples/{recipe}/hdpo.yaml", model, ("h200",), (world,), (f"parallel={layout}", *more))


LAYOUTS = {
    "7B, context": _on_h200("qwen2.5-7b", "qwen2.5-7b", 16, "{tensor: 2, context: 2, sequence: true}"),
    "30B-A3B, stages in two chunks": _on_h200(
        "qwen3-235b-a22b",
        "qwen3-30b-a3b",
        32,
        "{tensor: 2, pipeline: 2, virtual_stages: 2, expert: 8, sequence: true}",
        "model.recompute=false",
    ),
}


def _point(model: str, world: int, layout: str, servers: int) -> Case:
    """Return a point of benchmarks/scaling.json: its lengths and its layout, on the colocated recipe."""
    lengths = ("data.prompts={max_prompt_tokens: 2048, max_privileged_tokens: 2048}", "rollout.max_new_tokens=6144")
    server = f"rollout.sglang.servers.tensor_parallel={servers}"
    overrides = (f"parallel={layout}", "train.micro_batch_tokens=8192", *lengths, server)
    guesses = {"prompt_tokens": 512, "privileged_prompt_tokens": 1024, "response_tokens": 2048}
    return Case("examples/qwen2.5-7b/hdpo.yaml", model, ("h200",), (world,), overrides, guesses)


STUDY = {
    "study: 7B": _point("qwen2.5-7b", 8, "{tensor: 2, sequence: true}", 4),
    "study: 30B-A3B": _point("qwen3-30b-a3b", 64, "{tensor: 2, expert: 8, sequence: true}", 4),
    "study: 32B": _point("qwen2.5-32b", 256, "{tensor: 4, pipeline: 2, virtual_stages: 2, sequence: true}", 8),
    "study: 235B": _point("qwen3-235b-a22b", 4096, "{tensor: 4, pipeline: 2, expert: 128, sequence: true}", 8),
}
CASES = EXAMPLES | LAYOUTS | STUDY


def main() -> None:
    """Rehearse, and write the records after each rank, so that an interruption loses nothing; then the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="CASE", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--ranks", choices=["own", "many", "both"], default="both", help="own layout, 1,024, or both")
    parser.add_argument("--micro-batches", type=int, default=4, metavar="N", help="of an update, at least; default: 4")
    parser.add_argument("--page", action="store_true", help="rehearse nothing, write the page anew")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - CASES.keys():
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    for name in [] if arguments.page else arguments.names or CASES:
        for asked in asked_of(CASES[name], arguments.ranks, arguments.micro_batches):
            for rank, record in rehearse_case(name, asked):
                # Read again: another process may rehearse other cases.
                records = read_records(RECORDS) | {f"{name}, {asked.world} {asked.gpu}, rank {rank}": record}
                write_records(RECORDS, records)
    PAGE.write_text(page(read_records(RECORDS)))


def asked_of(case: Case, ranks: str, micro_batches: int) -> Iterator[Asked]:
    """Yield what to rehearse. ranks: own, many or both."""
    worlds = {"own": case.worlds[:1], "many": case.worlds[1:], "both": case.worlds}[ranks]
    for world in worlds:
        for gpu in case.gpus:
            yield Asked(case.recipe, list(case.overrides), gpu, world, case.model, micro_batches, case.guesses)


def rehearse_case(name: str, asked: Asked) -> Iterator[tuple[int, Record]]:
    """Yield number and record of each kind of rank."""
    setting = setting_of_record({"asked": vars(asked)})
    for rank in sampled_ranks(setting.layout):
        began = time.monotonic()
        what = f"{name}, {asked.world} {asked.gpu}, rank {rank}"
        try:
            found, _ = rehearse_rank(asked, setting, rank)
        except RehearsalError as error:
            print(f"{what}: {error}", file=sys.stderr, flush=True)
            continue
        print(f"{what}: {time.monotonic() - began:.0f} s", flush=True)
        yield rank, record_of(asked, found)


HEAD = """\
# Rehearsals beside their plans

Written by `tools/bench_rehearsal.py`: one rank of each kind, a step cut to a few micro-batches, on a CUDA device that
has memory and no arithmetic ([Rehearsal](../docs/rehearsal.md)). Memory in GiB. Errors are those of the present plan:
memory at rest, its peaks while the teacher scores and while the policy trains, launches of kernels. Collectives are
exact if number and bytes are. Launches and waits for the GPU are those of training, per micro-batch and per step.

The layers are plain torch's, which keep more for the backward pass than Transformer Engine's: a recipe that is planned
with these may run out of memory here. Experts get equal numbers of tokens."""
COLUMNS = (
    "case", "layout", "GPU", "rank", "at rest", "peak", "reserved", "plan: rest", "scoring", "training",
    "collectives exact", "launches", "plan", "waits", "of ours", "free after sync",
)  # fmt: skip
SECTIONS = {
    "The examples, at their own layout and on 1,024 ranks": EXAMPLES,
    "Context parallelism, experts, stages of several chunks": LAYOUTS,
    "Points of the scaling study": STUDY,
}


def page(records: dict[str, Record]) -> str:
    """Return the page: one row per rank."""
    rows = {key: _row(key.partition(f", {record['asked']['world']} ")[0], record) for key, record in records.items()}
    parts = [HEAD]
    for title, cases in SECTIONS.items():
        own = [row for key, row in rows.items() if any(key.startswith(f"{name}, ") for name in cases)]
        if not own:
            continue
        parts += ["", f"## {title}", "", _cells(COLUMNS), _cells(["---"] * len(COLUMNS)), *own]
    return "\n".join(parts) + "\n"


def _row(name: str, record: Record) -> str:
    asked, rank = record["asked"], rank_of(record)
    first = [name, str(setting_of_record(record).layout), asked["gpu"], f"{rank['rank']:,} of {asked['world']:,}"]
    if (failed := rank["failure"]) is not None:
        text = f"runs out of memory in {failed['phase']}: {failed['text']}"
        return _cells([*first, text, *[""] * (len(COLUMNS) - len(first) - 1)])
    lines, train, sync = compared(record), last(rank, "train"), last(rank, "sync")
    assert train is not None and sync is not None
    errors = {line.what: line.error for line in lines if not line.of_collective}
    names = {line.what for line in lines if line.of_collective}
    wrong = {line.what for line in lines if line.of_collective and line.planned != line.rehearsed}
    ours = sum(count for place, count in train["waits"].items() if place.startswith("megatron_hdpo/"))
    return _cells([
        *first,
        *(gib(train[key]) for key in ("allocated", "peak", "reserved_peak")),
        *(_percent(errors.get(f"memory{what}")) for what in (" at rest", ", peak of teacher", ", peak of train")),
        f"{len(names) - len(wrong)} of {len(names)}",
        f"{train['launches'] / sum(map(len, rank['updates'])):,.0f}",
        _percent(errors.get("train: kernels launched")),
        f"{sum(train['waits'].values()):,}",
        f"{ours}",
        gib(sync["free"]),
    ])  # fmt: skip


def _cells(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:+.1%}"


if __name__ == "__main__":
    main()
