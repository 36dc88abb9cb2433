"""Compare the metrics of two folders of runs bit for bit: what a refactoring has to show.

    python examples/compare/compare.py --seeds 0 --steps 5 --warmup-steps 150 --out runs/before
    python tools/same_numbers.py runs/before runs/after

Runs are found by their metrics.jsonl, at the same places in both folders. Seconds, speeds and memory are not compared;
a metric that only the second folder has is counted and said. Exits with 1 where a number differs or is missing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import _environment  # noqa: F401

from megatron_hdpo.tracking.metrics import METRICS_FILE, read_metrics

MEASURED = re.compile(r"time|(time|perf|memory|ranks|health)/.*|.*(_s|_per_s|_bytes|_gib)")
"""Names of metrics that depend on the machine and the moment."""


def main() -> None:
    """Read the command line, compare, and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--renamed", metavar="OLD=NEW", action="append", default=[], help="a metric with a new name")
    arguments = parser.parse_args()
    renamed = dict(pair.split("=", 1) for pair in arguments.renamed)
    runs = sorted(path.parent.relative_to(arguments.before) for path in arguments.before.rglob(METRICS_FILE))
    if not runs:
        sys.exit(f"no {METRICS_FILE} below {arguments.before}")
    compared, new, differences = 0, set[str](), []
    for run in runs:
        if not (arguments.after / run / METRICS_FILE).exists():
            differences.append(f"{run}: there is no such run in {arguments.after}")
            continue
        before, after = numbers(arguments.before / run, renamed), numbers(arguments.after / run, {})
        compared += len(before)
        new |= {name for _, name in after.keys() - before.keys()}
        differences += [f"{run}: {line}" for line in different(before, after)]
    for line in differences:
        print(line)
    print(f"{len(runs)} runs, {compared} numbers compared, {len(differences)} differ")
    print(f"new metrics: {', '.join(sorted(new)) or 'none'}")
    sys.exit(bool(differences))


def numbers(run: Path, renamed: Mapping[str, str]) -> dict[tuple[int, str], float | None]:
    """Return the numbers of a run by step and name, those that a clock or the machine gives left out."""
    return {
        (int(record["step"]), renamed.get(name, name)): value
        for record in read_metrics(run)
        for name, value in record.items()
        if name != "step" and not MEASURED.fullmatch(name)
    }


def different(
    before: Mapping[tuple[int, str], float | None], after: Mapping[tuple[int, str], float | None]
) -> Iterator[str]:
    """Yield a line for each number of `before` that `after` lacks or has with other bits."""
    for (step, name), value in before.items():
        if (step, name) not in after:
            yield f"step {step}: {name} is missing"
        elif (other := after[step, name]) != value:
            yield f"step {step}: {name} was {value!r} and is {other!r}"


if __name__ == "__main__":
    main()
