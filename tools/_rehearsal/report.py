"""What a rehearsal found, as text: memory by phase, waits, and the plan beside it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from _rehearsal.planned import Line, last
from megatron_hdpo.costs.cluster import GIB

_WIDTH = 130
_SHOWN_WAITS = 12


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text: the first column aligned to the left, the others to the right."""
    made = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, name in enumerate(head):
        made.add_column(name, justify="right" if index else "left")
    for row in rows:
        made.add_row(*row)
    stream = io.StringIO()
    Console(file=stream, width=_WIDTH, highlight=False, no_color=True).print(made)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")


def rank_text(rank: dict[str, Any], compared: Sequence[Line]) -> str:
    """Return the text about one rank. rank: what `ranks.run` told."""
    parts = [phase_table(rank), waits_table(rank)]
    if compared:
        parts.append(comparison(compared))
    if rank["failure"] is None:
        parts.append(f"checkpoint: {gib(rank['saved'])} GiB of this rank")
    else:
        parts.append(failure_line(rank))
    return "\n\n".join(filter(None, parts))


def phase_table(rank: dict[str, Any]) -> str:
    """Return the table of memory, launches and waits by phase."""
    head = [
        "phase",
        "allocated",
        "peak",
        "reserved",
        "fragmented",
        "free",
        "pinned",
        "RSS",
        "launches",
        "waits",
        "TFLOP",
    ]
    rows = [
        [
            phase["phase"],
            *map(gib, (phase["allocated"], phase["peak"], phase["reserved_peak"])),
            f"{1 - phase['peak'] / max(1, phase['reserved_peak']):.1%}",
            *map(gib, (phase["free"], phase["pinned"], phase["rss"])),
            f"{phase['launches']:,}",
            f"{phase['device_waits']:,}",
            f"{phase['flops'] / 1e12:,.1f}",
        ]
        for phase in rank["phases"]
    ]
    return table(
        f"rank {rank['rank']}, stage {rank['stage']}: GiB of {gib(rank['total'])} at the end of each phase", head, rows
    )


def waits_table(rank: dict[str, Any]) -> str:
    """Return the table of the places that wait for the GPU during a step's training."""
    train = last(rank, "train")
    if train is None:
        return ""
    batches = max(1, sum(map(len, rank["updates"])))
    found = sorted(train["waits"].items(), key=lambda item: -item[1])
    rows = [[place, f"{count:,}", f"{count / batches:.1f}"] for place, count in found[:_SHOWN_WAITS]]
    rows += [[f"{len(found) - _SHOWN_WAITS} more places", "", ""]] if len(found) > _SHOWN_WAITS else []
    title = f"waits for the GPU in {batches} micro-batches of train ({train['launches'] / batches:,.0f} launches each)"
    return table(title, ["place", "waits", "per micro-batch"], rows)


def comparison(lines: Sequence[Line]) -> str:
    """Return the table of planned and rehearsed numbers."""
    rows = [
        [line.what, *(_amount(line.unit, n) for n in (line.planned, line.rehearsed)), _error(line)] for line in lines
    ]
    return table("plan and rehearsal", ["", "planned", "rehearsed", "error"], rows)


def failure_line(rank: dict[str, Any]) -> str:
    """Return the line that says where a rank ran out of memory."""
    failed = rank["failure"]
    return (
        f"rank {rank['rank']} (stage {rank['stage']}) runs out of memory in phase {failed['phase']}: {failed['text']} "
        f"(allocated {gib(failed['allocated'])} GiB, reserved {gib(failed['reserved'])}, free {gib(failed['free'])})"
    )


def largest_errors(lines: Sequence[Line]) -> Iterator[str]:
    """Yield a sentence on the plan's largest errors: of memory, and of collectives."""
    memory = [abs(line.error) for line in lines if line.what.startswith("memory") and line.error is not None]
    collectives = [line for line in lines if line.of_collective]
    names = {line.what for line in collectives}
    wrong = {line.what for line in collectives if line.planned != line.rehearsed}
    if memory:
        yield f"memory planned within {max(memory):.1%}"
    if names:
        yield f"{len(names) - len(wrong)} of {len(names)} collectives exact"


def gib(num_bytes: float) -> str:
    """Return bytes in GiB."""
    return f"{num_bytes / GIB:.2f}"


def _amount(unit: str, number: float) -> str:
    if unit == "FLOP":
        return f"{number / 1e12:,.1f} TFLOP"
    return f"{number / GIB:,.3f} GiB" if unit == "bytes" else f"{number:,.0f}"


def _error(line: Line) -> str:
    if line.planned == line.rehearsed:
        return "exact"
    return "-" if line.error is None else f"{line.error:+.1%}"
