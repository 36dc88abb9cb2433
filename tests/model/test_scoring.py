"""Scorings that refer to one another: their order, what is refused, and their numbers on every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_helper import run_ranks
from full_logits import load, response_logits
from layout_cases import LAYOUTS
from tiny_policy import build_policy, joined, make_checkpoint, make_scorings

from megatron_hdpo.model.scoring import ScoringContext, by_dependency
from megatron_hdpo.types.learning import Scoring

IDS, OTHER = np.array([3, 4], dtype=np.int32), np.array([3, 5], dtype=np.int32)


def scoring(name: str, weights: Any = "teacher", ids: np.ndarray = IDS, **more: Any) -> Scoring:
    references = {key: (0, "student", 0, value) for key, value in more.items() if key in ("at", "reverse_kl_to")}
    return Scoring((0, "student", 0, name), IDS, ids, weights, **{**more, **references})


def test_waves_follow_references() -> None:
    first = scoring("a", "policy", at="b")
    second = scoring("b", reverse_kl_to="c", top_k=3)
    third = scoring("c", "reference", hidden=True)
    alone = scoring("d", "policy")
    waves = by_dependency([first, second, third, alone])
    assert waves == {
        (0, "reference"): [third],
        (0, "policy"): [alone],
        (1, "teacher"): [second],
        (2, "policy"): [first],
    }


@pytest.mark.parametrize(
    ("scorings", "message"),
    [
        ([scoring("a"), scoring("a", "policy")], "two scorings of a step have the same key"),
        ([scoring("a", at="b")], "which is not asked for"),
        ([scoring("a", at="b"), scoring("b", top_k=2, ids=OTHER)], "which is of another response"),
        ([scoring("a", at="b"), scoring("b")], "which has no top_k"),
        ([scoring("a", reverse_kl_to="b"), scoring("b", top_k=2)], "which keeps no hidden states"),
        ([scoring("a", at="a", top_k=2)], "refers back to itself"),
        ([scoring("a", at="b", top_k=2), scoring("b", at="a", top_k=2)], "refers back to itself"),
    ],
)
def test_senseless_references_are_refused(scorings: list[Scoring], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_dependency(scorings)


def _pairs() -> tuple[list[Scoring], list[Scoring]]:
    """Scorings after one context, and of the same responses after another, which refer to them."""
    first = [replace(s, role="teacher", top_k=4, hidden=True) for s in make_scorings()]
    second = [
        replace(
            s,
            key=(*s.key[:3], "second"),
            context_ids=s.context_ids[::-1].copy(),
            role="policy",
            top_k=0,
            at=s.key,
            reverse_kl_to=s.key,
        )
        for s in make_scorings()
    ]
    return first, second


def _visit(path: Path, names: list[str]) -> dict[str, Any]:
    found = {}
    for layout in names:
        with joined(**LAYOUTS[layout][1]) as context:
            policy = build_policy(path, context, head_chunk=5)
            first, second = _pairs()
            asked = {s.key: s for s in (*first, *second)}
            scores = policy.score(first, answered=ScoringContext(asked, {}, {}))
            heads = {"teacher": policy.head_copy(policy.head_rows)} if context.is_last_stage else {}
            scores |= policy.score(second, answered=ScoringContext(asked, scores, heads))
            # Tensors do not outlive the rank that shares them.
            kept = {
                k: s if s.hidden_TH is None else replace(s, hidden_TH=s.hidden_TH.numpy()) for k, s in scores.items()
            }
            found[layout] = kept, context.is_last_stage
    return found


@pytest.mark.parametrize(("world", "names"), [(1, ["one_rank"]), (2, ["tp2_sp", "pp2", "pp2_vp2", "cp2"])])
def test_numbers(world: int, names: list[str], tmp_path: Path) -> None:
    path = make_checkpoint("qwen3_tied", tmp_path)
    model = load(path)
    for rank in run_ranks(world, _visit, path, names):
        for scores, last in rank.values():
            assert bool(scores) == last
            for s in _pairs()[1] if last else ():
                score, other = scores[s.key], scores[s.at]
                with torch.no_grad():
                    before = make_scorings()[s.key[0]]
                    p, q = (
                        (response_logits(model, c, s.response_ids) / s.temperature).log_softmax(-1)
                        for c in (before.context_ids, s.context_ids)
                    )
                ids = torch.from_numpy(other.top.ids_TK).long()
                assert torch.equal(ids.sort(-1).values, p.topk(4, -1).indices.sort(-1).values)
                np.testing.assert_allclose(score.at_logprobs_TK, q.gather(-1, ids), atol=3e-5)
                np.testing.assert_allclose(score.reverse_kl_T, (q.exp() * (q - p)).sum(-1), atol=3e-5)
                head = model.get_output_embeddings().weight.detach()
                logits = torch.from_numpy(other.hidden_TH).double() @ head.T / s.temperature
                np.testing.assert_allclose(logits.log_softmax(-1), p, atol=3e-4)
                assert score.hidden_TH is None and score.top is None and other.at_logprobs_TK is None
