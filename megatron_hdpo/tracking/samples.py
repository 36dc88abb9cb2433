"""A few saved rollouts for people to read."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

_SHOWN_GROUPS = 4
_READ_LINES = 256
_TEXT_LENGTH = 3000
_FILE = re.compile(r"step_(\d+)(\.rank_\d+)?\.jsonl(\.gz)?")


@dataclass(frozen=True)
class SampleText:
    """The text and reward of one rollout. kind: `rollout` or `privileged rollout`."""

    kind: str
    reward: float
    text: str


@dataclass(frozen=True)
class SampleGroup:
    """One problem and some of its rollouts. source: file and line."""

    source: str
    question: str
    answer: str
    privileged_prompt: str | None
    samples: list[SampleText]


def pick_samples(folder: Path) -> tuple[list[SampleGroup], list[str]]:
    """Return groups of the newest step with saved rollouts in `folder`, and notes on unreadable lines.

    Groups with privileged rollouts come first. `sampling.saved.write_groups` writes the lines; only `question`,
    `answer`, `samples`, `privileged` (`text` and `reward` of each) and `privileged_prompt` are read, so that a report
    needs no engine. Without the folder there are no groups.
    """
    groups: list[SampleGroup] = []
    notes: list[str] = []
    for source, line in islice(_newest_lines(folder, notes), _READ_LINES):
        try:
            groups.append(_group(json.loads(line), source))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            notes.append(f"{source}: not a saved group of rollouts ({type(error).__name__}: {error})")
    groups.sort(key=_interest, reverse=True)
    return groups[:_SHOWN_GROUPS], notes[:_SHOWN_GROUPS]


def _newest_lines(folder: Path, notes: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the lines of the newest step, each with its file and number; damaged files are noted."""
    by_step: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("step_*.jsonl*")):
        if match := _FILE.fullmatch(path.name):
            by_step.setdefault(int(match[1]), []).append(path)
    for path in by_step.get(max(by_step, default=0), []):
        opened = gzip.open if path.suffix == ".gz" else open
        try:
            with opened(path, "rt", encoding="utf-8", errors="replace") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield f"{folder.name}/{path.name}, line {number}", line
        except (OSError, EOFError, zlib.error) as error:
            notes.append(f"{folder.name}/{path.name}: cannot be read to its end ({type(error).__name__}: {error})")


def _group(line: Mapping[str, Any], source: str) -> SampleGroup:
    samples = _extremes(line["samples"], "rollout")
    samples += _extremes(line["privileged"], "privileged rollout")
    prompt = line["privileged_prompt"]
    return SampleGroup(
        source, _cut(line["question"]), _cut(line["answer"]), None if prompt is None else _cut(prompt), samples
    )


def _extremes(samples: Sequence[Mapping[str, Any]], kind: str) -> list[SampleText]:
    """Return the best sample and, if its reward differs, the worst."""
    texts = [SampleText(kind, float(sample["reward"]), _cut(sample["text"])) for sample in samples]
    ranked = sorted(texts, key=lambda sample: -sample.reward)
    return ranked[:1] + [sample for sample in ranked[-1:] if sample.reward != ranked[0].reward]


def _interest(group: SampleGroup) -> tuple[bool, int]:
    return any(sample.kind != "rollout" for sample in group.samples), len(group.samples)


def _cut(text: Any) -> str:
    text = str(text)
    return (
        text if len(text) <= _TEXT_LENGTH else f"{text[:_TEXT_LENGTH]} [... {len(text) - _TEXT_LENGTH} characters more]"
    )
