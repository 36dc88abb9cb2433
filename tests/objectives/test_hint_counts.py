"""Hints that do not fit: counted by every method that shows any, over all replicas, and said once."""

from __future__ import annotations

from typing import Any

import pytest
from hint_prompts import SUPPORT, StubPrompts, answers
from rollout_groups import group, sample

from megatron_hdpo.objectives.base import ObjectiveDeps, hint_metrics
from megatron_hdpo.objectives.contrastive_opsd import ContrastiveOPSDConfig
from megatron_hdpo.objectives.registry import build_objective
from megatron_hdpo.objectives.rlcsd import RLCSDConfig
from megatron_hdpo.objectives.rlsd import RLSDConfig
from megatron_hdpo.objectives.sdpo import SDPOConfig
from megatron_hdpo.objectives.srpo import SRPOConfig
from megatron_hdpo.training.learner import Learner
from megatron_hdpo.types.rollouts import Group

SHORT, LONG = r"so \boxed{4}", r"so it is, after all, \boxed{5}"  # StubPrompts cuts what is longer than 20 characters
METHODS = {
    "sdpo": SDPOConfig.model_validate({"distill": {"top_k": SUPPORT, "support": "student"}}),
    "srpo": SRPOConfig.model_validate({"distill": {"top_k": SUPPORT, "support": "student"}}),
    "rlsd": RLSDConfig(evidence="contrast"),
    "rlcsd": RLCSDConfig(),
    "contrastive_opsd": ContrastiveOPSDConfig.model_validate({"distill": {"top_k": SUPPORT, "tail": "bucket"}}),
}


def groups() -> list[Group]:
    rows = [[(1.0, LONG), (1.0, SHORT), (0.0, SHORT)], [(0.0, LONG), (1.0, LONG), (0.0, SHORT), (1.0, SHORT)]]
    return [
        group(
            [sample(r, 2, text=text, token_ids=[8 * n + 2 * i, 1]) for i, (r, text) in enumerate(row)], problem=f"p/{n}"
        )
        for n, row in enumerate(rows)
    ]


def totals_of(config: Any, part: list[Group]) -> tuple[dict[str, float], StubPrompts, Any]:
    prompts = StubPrompts()
    objective = build_objective(config, ObjectiveDeps(1.0, 1, prompts))
    objective.begin_step(0, part)
    scores = answers(objective.scorings(part))
    assert objective.totals(part, scores).keys().isdisjoint({"hint/shown", "hint/cut"})
    return objective.hint_counts.totals(), prompts, objective  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_counts_what_it_showed(name: str) -> None:
    parts = [totals_of(METHODS[name], [one]) for one in groups()]
    shown = [len(hint.attempt) for _, prompts, _ in parts for hint in prompts.shown]
    totals = {key: sum(part[key] for part, *_ in parts) for key in parts[0][0]}
    cut = [length - 20 for length in shown if length > 20]
    assert (totals["hint/shown"], totals["hint/cut"], totals["hint/lost_tokens"]) == (len(shown), len(cut), sum(cut))
    metrics = hint_metrics(totals)
    assert metrics["hint/cut_share"] == pytest.approx(len(cut) / len(shown)) and cut
    assert metrics["hint/lost_tokens"] == sum(cut)


def test_a_step_begins_at_zero() -> None:
    _, _, objective = totals_of(METHODS["sdpo"], groups())
    objective.begin_step(1, [])
    assert objective.hint_counts.totals() == {} and hint_metrics({}) == {}


def test_a_step_with_many_cut_hints_is_said_once() -> None:
    said: list[str] = []

    class Console:
        warn = staticmethod(said.append)

    learner = Learner(None, None, None, Console())  # type: ignore[arg-type]
    for step, share in enumerate((0.0, 0.04, 0.5, 0.6)):
        learner._watch_hints({"hint/cut_share": share, "hint/lost_tokens": 12345.0}, step)
    learner._watch_hints({}, 9)
    (line,) = said
    assert line.startswith("step 3: 50% of the hints were too long and were cut, by 12,345 tokens together")
