r"""Measure the judge of mathematical answers: right answers that it refuses, wrong ones that it accepts.

    python tools/bench_rewards.py --json benchmarks/rewards.json
    python tools/bench_rewards.py --made 0 --golds "MATH-500=math500.jsonl" --json benchmarks/rewards.json

Golds are made up by a seed, of every kind that sets of problems hold, or read from JSON lines with an `answer`. Each
must equal itself, its other spellings (`_respellings.py`), and none of the wrong answers that are made of it
(`_perturbations.py`). Beside the judge stands math-verify alone: `verify(parse(gold), parse(answer))`, both in a box.

Rates are per 10,000 pairs. Of each gold, the kinds that were tried least so far come first, so that rare kinds are not
drowned by those that fit every text. A verdict takes at most --limit seconds; one that takes longer, or an error of the
check, is none, and counted apart.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import _environment  # noqa: F401
import math_verify
from _made_golds import NamedGold, made_golds
from _perturbations import perturbations
from _respellings import respellings

from megatron_hdpo.rewards.gold import JUDGES
from megatron_hdpo.rewards.math import GoldError, parse_gold, score_math

PER = 10_000
MADE = "made up"


class _OutOfTime(BaseException):
    """The limit of a verdict has passed; no library that catches exceptions catches this one."""


@dataclass
class Tally:
    """Verdicts on the pairs of one kind."""

    pairs: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    none: Counter[str] = field(default_factory=Counter)

    def add(self, verdicts: dict[str, bool | None], right: bool) -> None:
        """Count the verdict of each judge on one pair."""
        self.pairs += 1
        for judge, verdict in verdicts.items():
            self.none[judge] += verdict is None
            self.wrong[judge] += verdict is not None and verdict is not right

    def report(self) -> dict[str, Any]:
        """Return the counts, and the rates per 10,000 pairs."""
        counts: dict[str, Any] = {"pairs": self.pairs}
        for judge in JUDGES_HERE:
            counts[judge] = {"wrong": self.wrong[judge], f"per_{PER}": round(PER * self.wrong[judge] / self.pairs, 1)}
            if self.none[judge]:
                counts[judge]["no_verdict"] = self.none[judge]
        return counts


def main() -> None:
    """Run the measurement and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golds", nargs="*", default=[], metavar="[NAME=]FILE", help="JSON lines with an `answer`")
    parser.add_argument("--made", type=int, default=1000, help="golds that are made up")
    parser.add_argument("--most", type=int, help="golds of each file at most, drawn by the seed")
    parser.add_argument("--per-gold", type=int, default=6, help="spellings, and wrong answers, of each gold")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds for a verdict")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print every wrong verdict")
    parser.add_argument("--json", type=Path, help="write the report to this file; other sets in it are kept")
    options = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once for each formula that it does not read
    sets = {MADE: made_golds(options.made, options.seed)} if options.made else {}
    sets |= dict(read(name, options.most, options.seed) for name in options.golds)
    made_with = {"seed": options.seed, "versions": {name: version(name) for name in JUDGES}}
    measured = {name: measure(golds, options) for name, golds in sets.items()}
    report = made_with | {"sets": (_kept(options.json, made_with) if options.json else {}) | measured}
    text = json.dumps(report, indent=2) + "\n"
    print(text, end="")
    if options.json:
        options.json.write_text(text)


def _kept(path: Path, made_with: dict[str, Any]) -> dict[str, Any]:
    """Return the sets of an earlier report with the same seed and versions."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    return earlier["sets"] if made_with.items() <= earlier.items() else {}


def read(argument: str, most: int | None, seed: int) -> tuple[str, list[NamedGold]]:
    """Return the name of a set and its golds, each once."""
    name, _, path = argument.rpartition("=")
    with Path(path).open(encoding="utf-8") as rows:  # str.splitlines also splits within a row
        answers = list(dict.fromkeys(json.loads(row)["answer"] for row in rows))
    if most is not None and len(answers) > most:
        answers = Random(seed).sample(answers, most)
    return name or Path(path).stem, [NamedGold("row", answer) for answer in answers]


def measure(golds: Sequence[NamedGold], options: argparse.Namespace) -> dict[str, Any]:
    """Return the report on the golds of one set."""
    began, rng = time.perf_counter(), Random(options.seed)
    refused = [gold for gold in golds if _is_refused(gold.text)]
    itself, same, other = Tally(), {}, {}
    dropped: Counter[str] = Counter()
    for gold in golds:
        if gold in refused:
            continue
        _judge(gold, gold.text, True, itself, "itself", options)
        spellings = respellings(gold.text)
        for kind in _least_tried(spellings, same, options.per_gold):
            _judge(gold, rng.choice(spellings[kind]), True, same.setdefault(kind, Tally()), kind, options)
        wrong, left_out = perturbations(gold.text, rng)
        dropped.update(left_out)
        for kind in _least_tried(wrong, other, options.per_gold):
            _judge(gold, wrong[kind], False, other.setdefault(kind, Tally()), kind, options)
    return {
        "golds": len(golds),
        "per_gold": options.per_gold,
        "refused": len(refused),
        "itself": itself.report(),
        "other_spellings": _all(same) | {"kinds": len(same), "by_kind": _reports(same)},
        "wrong_answers": _all(other) | {"kinds": len(other), "by_kind": _reports(other)},
        "wrong_answers_left_out": dict(sorted(dropped.items())),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _is_refused(gold: str) -> bool:
    try:
        parse_gold(gold)
    except GoldError:
        return True
    return False


def _least_tried(kinds: Iterable[str], tallies: dict[str, Tally], most: int) -> list[str]:
    return sorted(kinds, key=lambda kind: tallies[kind].pairs if kind in tallies else 0)[:most]


def _judge(gold: NamedGold, answer: str, right: bool, tally: Tally, kind: str, options: argparse.Namespace) -> None:
    verdicts = {name: _verdict(judge, gold.text, answer, options.limit) for name, judge in JUDGES_HERE.items()}
    tally.add(verdicts, right)
    ours = verdicts["ours"]
    if options.show and ours is not right:
        print(f"{kind}: {ours} for gold {gold.text!r}, answer {answer!r} (math-verify: {verdicts['math_verify']})")


def _verdict(judge: Callable[[str, str], bool], gold: str, answer: str, limit: float) -> bool | None:
    """Return the verdict of a judge; None after the limit of time, and for an error."""
    try:
        with _limited(limit):
            return judge(gold, answer)
    except (_OutOfTime, Exception):
        return None


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGVTALRM, stop)  # SIGALRM is math-verify's
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def ours(gold: str, answer: str) -> bool:
    """Return the verdict of this project."""
    return score_math(gold, rf"\boxed{{{answer}}}") == 1.0


def math_verify_alone(gold: str, answer: str) -> bool:
    """Return the verdict of math-verify with its defaults."""
    return bool(math_verify.verify(math_verify.parse(rf"\boxed{{{gold}}}"), math_verify.parse(rf"\boxed{{{answer}}}")))


JUDGES_HERE: dict[str, Callable[[str, str], bool]] = {"ours": ours, "math_verify": math_verify_alone}


def _all(tallies: dict[str, Tally]) -> dict[str, Any]:
    total = Tally()
    for tally in tallies.values():
        total.pairs += tally.pairs
        total.wrong.update(tally.wrong)
        total.none.update(tally.none)
    return total.report() if total.pairs else {"pairs": 0}


def _reports(tallies: dict[str, Tally]) -> dict[str, Any]:
    return {kind: tally.report() for kind, tally in sorted(tallies.items())}


if __name__ == "__main__":
    main()
