"""Files and table of an evaluation that is made by itself, not in the course of a run.

evaluation.json: the model, the sampling and the metrics. evaluation_samples.jsonl: one line per problem with its judged
responses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hdpo.evaluation.evaluate import Responses
from megatron_hdpo.sampling.saved import sample_record
from megatron_hdpo.types.rollouts import Group

METRICS_FILE = "evaluation.json"
SAMPLES_FILE = "evaluation_samples.jsonl"


def write_evaluation(
    folder: Path,
    setting: Mapping[str, Any],
    metrics: Mapping[str, float],
    sampled: Sequence[Group],
    greedy: Sequence[Group],
) -> None:
    """Write both files into `folder`, over those of an earlier evaluation.

    setting: what the numbers depend on. sampled, greedy: the whole groups of the evaluation's `Responses`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in _records(sampled, greedy))
    (folder / SAMPLES_FILE).write_text("".join(lines), encoding="utf-8")
    (folder / METRICS_FILE).write_text(json.dumps({**setting, "metrics": metrics}, indent=2) + "\n", encoding="utf-8")


def _records(sampled: Sequence[Group], greedy: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """Yield what the reader wants to know of each problem: its question, its answer and the judged responses."""
    greedy_samples = {group.problem.id: group.samples for group in greedy}
    for group in sampled:
        problem = group.problem
        yield {
            "set": problem.task,
            "id": problem.id,
            "question": problem.question,
            "answer": problem.answer,
            "samples": [sample_record(sample, problem.id) for sample in group.samples],
            "greedy": [sample_record(sample, problem.id) for sample in greedy_samples.get(problem.id, [])],
            "dropped": group.dropped,
        }


def evaluation_table(metrics: Mapping[str, float], responses: Responses) -> list[dict[str, str]]:
    """Return a row per evaluation set: counts, and each rate with its 95 % interval.

    The number of samples that failed to be generated or judged has a column where it is not 0.
    """
    names = [name for name in metrics if name.endswith("_low") and "/accuracy/" not in name]
    rates = dict.fromkeys(name.rpartition("/")[2].removesuffix("_low") for name in names)
    dropped: dict[str, int] = {}
    for group in (*responses.sampled.outlines, *responses.greedy.outlines):
        name = group.problem.task
        dropped[name] = dropped.get(name, 0) + sum(group.dropped.values())
    return [
        {
            "set": name,
            **{key: f"{metrics[f'eval/{name}/{key}']:.0f}" for key in ("problems", "samples")},
            **{rate: rate_text(metrics, f"eval/{name}/{rate}", f"eval/{name}/problems") for rate in rates},
            **({"samples dropped": str(count)} if any(dropped.values()) else {}),
        }
        for name, count in dropped.items()
    ]


def rate_text(metrics: Mapping[str, float], name: str, problems: str = "") -> str:
    """Return a rate with its interval, `0.417 (0.245 to 0.612)`; "-" where it was not measured.

    problems: metric with the number of problems; a rate over fewer of them says so.
    """
    if metrics.get(name) is None:
        return "-"
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    interval = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
    count, every = metrics.get(f"{name}_problems"), metrics.get(problems)
    fewer = f", {count:.0f} problems" if count is not None and every is not None and count < every else ""
    return f"{metrics[name]:.3f}{interval}{fewer}"
