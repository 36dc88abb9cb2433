"""Evaluations of a run: each share of problems solved with its interval, and the best one so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hdpo.tracking.names import parse_share

_LONGEST_SET = 19


@dataclass(frozen=True)
class Measured:
    """A share of problems solved in one evaluation.

    share: `pass@k` or `greedy`. low, high: its 95 % interval over problems, None where it was not measured. best,
    best_step: the largest value so far, and the first step that had it.
    """

    dataset: str
    share: str
    value: float
    low: float | None
    high: float | None
    best: float
    best_step: int


class Evaluations:
    """Evaluations so far. records: the steps that are already in metrics.jsonl."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._best: dict[str, tuple[float, int]] = {}
        for record in records:
            self.add(record["step"], record)

    def add(self, step: int, metrics: Mapping[str, Any]) -> list[Measured]:
        """Take the metrics of a step; return its measured shares set by set, [] if nothing was evaluated."""
        measured = []
        for name, value in metrics.items():
            if value is None or (parsed := parse_share(name)) is None:
                continue
            if name not in self._best or value > self._best[name][0]:
                self._best[name] = (value, step)
            low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
            measured.append(Measured(*parsed, value, low, high, *self._best[name]))
        sets = list(dict.fromkeys(one.dataset for one in measured))
        return sorted(measured, key=lambda one: sets.index(one.dataset))


def moment(step: int) -> str:
    """Return "after step 20", for step 0 "before step 1"."""
    return f"after step {step}" if step else "before step 1"


def evaluation_lines(step: int, measured: Sequence[Measured]) -> list[str]:
    """Return the table of an evaluation, 80 characters wide at most."""
    sets = [_cut(one.dataset) for one in measured]
    wide = max(map(len, [*sets, "set"]))
    lines = [f"  {'set':{wide}}  {'metric':8}  value  {'95 % interval':14}  best so far"]
    for name, one in zip(sets, measured, strict=True):
        interval = "-" if one.low is None or one.high is None else f"{one.low:.3f} to {one.high:.3f}"
        best = "this one" if one.best_step == step else f"{one.best:.3f} {moment(one.best_step)}"
        lines.append(f"  {name:{wide}}  {one.share:8}  {one.value:.3f}  {interval:14}  {best}")
    return lines


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_SET else f"{name[: _LONGEST_SET - 3]}..."
