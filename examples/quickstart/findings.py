"""Findings of the quickstart's runs, read from their records and put into sentences.

Every share is the share of problems solved, a yes or no each, with its 95 % interval (Wilson's score interval).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hdpo.evaluation.passk import Estimate, wilson

Record = Mapping[str, Any]
Records = Sequence[Record]


@dataclass(frozen=True)
class Score:
    """Share of the problems of an evaluation set that were solved.

    lost_samples: samples that failed or were not judged.
    """

    solved: Estimate
    lost_samples: int = 0

    @property
    def text(self) -> str:
        """The share with its interval, such as `33 % (22 to 47 %)`."""
        value, low, high = (f"{100 * share:.0f}" for share in (self.solved.value, self.solved.low, self.solved.high))
        return f"{value} % ({low} to {high} %)"


def score(record: Record, name: str, metric: str, samples: int) -> Score | None:
    """Return the score of the evaluation set `name` in a step's record, None where it was not evaluated.

    metric: a yes or no per problem: `greedy`, or `pass@k` where k is the number of samples. samples: requested per
    problem.
    """
    share, problems = record.get(f"eval/{name}/{metric}"), record.get(f"eval/{name}/problems")
    if share is None or problems is None:
        return None
    lost = round(problems * samples - record[f"eval/{name}/samples"])
    return Score(wilson(round(share * problems), round(problems)), lost)


def verdict(ours: Score, theirs: Score, what: str) -> str:
    """Return a sentence: HDPO (`ours`) or GRPO (`theirs`) solves more of `what`, or there is no clear difference."""
    numbers = f"HDPO {ours.text}, GRPO {theirs.text}"
    if lost := ours.lost_samples + theirs.lost_samples:
        return f"{what}: no verdict, because {lost} samples of the last evaluation were lost ({numbers})."
    if ours.solved.low > theirs.solved.high:
        return f"{what}: HDPO solves more than GRPO ({numbers}; the 95 % intervals do not overlap)."
    if theirs.solved.low > ours.solved.high:
        return f"{what}: GRPO solves more than HDPO ({numbers}; the 95 % intervals do not overlap)."
    return f"{what}: no clear difference ({numbers}; the 95 % intervals overlap)."


def change(before: Score, after: Score, what: str) -> str:
    """Return a sentence: a run solves more or fewer of `what` after its steps, or there is no clear change."""
    numbers = f"{before.text} before, {after.text} after"
    if lost := before.lost_samples + after.lost_samples:
        return f"{what}: no verdict on the change, because {lost} samples were lost ({numbers})."
    if after.solved.low > before.solved.high:
        return f"{what}: more are solved than before ({numbers}; the 95 % intervals do not overlap)."
    if before.solved.low > after.solved.high:
        return f"{what}: fewer are solved than before ({numbers}; the 95 % intervals do not overlap)."
    return f"{what}: no clear change ({numbers}; the 95 % intervals overlap)."


def signal(records: Records, prompts_per_step: int) -> str:
    """Return a sentence on the cliffs of an HDPO run: how many were retried with the solution, kept and distilled."""
    steps = [record for record in records if record["step"] > 0]
    cliffs = sum(record.get("privileged/cliff_prompts", 0) for record in steps)
    tried = sum(record.get("privileged/rollouts", 0) for record in steps)
    kept = sum(record.get("privileged/kept", 0) for record in steps)
    tokens = sum(record.get("distill/tokens", 0) for record in steps)
    prompts = prompts_per_step * len(steps)
    text = f"{cliffs:.0f} of {prompts} prompts of its {len(steps)} steps were cliffs, from which GRPO learns nothing"
    if not tried:
        return f"{text}; none of them was tried again."
    text += f"; with the solution in the prompt {kept:.0f} of {tried:.0f} rollouts were right and kept"
    return f"{text}, and HDPO learned from {tokens:,.0f} of their tokens." if tokens else f"{text}: HDPO had none, too."
