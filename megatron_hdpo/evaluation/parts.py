"""Accuracy by level and by source of the problems of one task.

eval/<task>/accuracy/level-<level>    mean over its problems of the share of right samples, with _low, _high, _problems
eval/<task>/accuracy/source-<source>  the same by source
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import JudgedGroup

MOST_PARTS = 50
"""Levels, or sources, of a task that are told apart; with more of them there are no such metrics."""
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.+-]+")


def parts_of(groups: Sequence[JudgedGroup]) -> dict[str, list[JudgedGroup]]:
    """Return the groups of one task by `level-<level>` and `source-<source>`, in order of these names.

    Problems without a level or source are in no such part. A level or source with more than MOST_PARTS values is left
    out (`left_out` says so).
    """
    found: dict[str, list[JudgedGroup]] = {}
    for kind, by_value in _by_kind(groups).items():
        if len(by_value) <= MOST_PARTS:
            found |= {f"{kind}-{value}": by_value[value] for value in sorted(by_value, key=_by_number)}
    return found


def left_out(groups: Sequence[JudgedGroup]) -> dict[str, int]:
    """Return the number of values of each of `level` and `source` that has more than MOST_PARTS."""
    return {kind: len(values) for kind, values in _by_kind(groups).items() if len(values) > MOST_PARTS}


def _by_kind(groups: Sequence[JudgedGroup]) -> Mapping[str, dict[str, list[JudgedGroup]]]:
    kinds: dict[str, dict[str, list[JudgedGroup]]] = {"level": {}, "source": {}}
    for group in groups:
        for kind, by_value in kinds.items():
            if (value := _value(group.problem, kind)) is not None:
                by_value.setdefault(value, []).append(group)
    return kinds


def _value(problem: Problem, kind: str) -> str | None:
    """Return the level or source as part of a metric's name: other characters become one `_`; None without any."""
    text = problem.level if kind == "level" else problem.source
    return None if text is None else _NOT_IN_A_NAME.sub("_", text).strip("_") or "other"


def _by_number(value: str) -> tuple[float, str]:
    """Return what sorts `2` before `10`, and `Level_2` before `Level_10`."""
    digits = re.search(r"\d+(\.\d+)?", value)
    return (float(digits.group()) if digits else -1.0, value)
