"""Siblings and demonstrations: who may serve as a hint, what is shown of them, and how they are drawn."""

from __future__ import annotations

from collections import Counter

import pytest
from pydantic import ValidationError
from rollout_groups import group, sample

from megatron_hdpo.data.prompts import Hint
from megatron_hdpo.objectives.demonstrations import DemonstrationConfig, demonstration
from megatron_hdpo.objectives.siblings import (
    PairConfig,
    SiblingConfig,
    draw,
    has_pair,
    right_siblings,
    sibling_hint,
    wrong_siblings,
)

TARGET = sample(1.0, token_ids=[9])
THOUGHT = "<think>maybe \\boxed{3}</think>It is \\boxed{4}."


def told(reward: float, text: str = "it is \\boxed{4}", feedback: str | None = None):
    made = sample(reward, text=text)
    made.feedback = feedback
    return made


def test_a_lone_success_has_no_right_sibling_and_a_lone_failure_no_wrong_one() -> None:
    config = PairConfig()
    for rewards, pairs in [
        ([1, 0, 0], [False, True, True]),
        ([1, 1, 0], [True, True, False]),
        ([1, 0], [False, False]),
        ([1, 1, 1], [False] * 3),
        ([0, 0, 0], [False] * 3),
        ([1], [False]),
    ]:
        made = group([told(float(reward)) for reward in rewards])
        assert [has_pair(made, s, config) for s in range(len(rewards))] == pairs


def test_siblings_are_told_by_their_place() -> None:
    """A copy of the sample by another draw is a sibling; the sample itself never is."""
    copies = [sample(1.0, token_ids=[1, 2]), sample(1.0, token_ids=[1, 2]), told(0.0)]
    made = group(copies)
    assert right_siblings(made, 0, SiblingConfig()) == [copies[1]]
    assert right_siblings(made, 0, SiblingConfig())[0] is copies[1]
    assert right_siblings(made, 2, SiblingConfig()) == copies[:2]


def test_what_makes_a_sibling_right_is_its_reward() -> None:
    made = group([told(0.0), told(0.6), told(0.4)])
    assert right_siblings(made, 0, SiblingConfig(success_threshold=0.5)) == [made.samples[1]]
    assert right_siblings(made, 0, SiblingConfig()) == []
    assert wrong_siblings(made, 1, PairConfig(success_threshold=0.5)) == [made.samples[0], made.samples[2]]


def test_wrong_siblings_need_an_answer_unless_told_otherwise() -> None:
    made = group([told(1.0), told(0.0, "no idea"), told(0.0, "so \\boxed{5}"), told(0.0, " ")])
    assert wrong_siblings(made, 0, PairConfig()) == [made.samples[2]]
    assert wrong_siblings(made, 0, PairConfig(wrong_need_answer=False)) == made.samples[1:3]


def test_what_is_shown_of_a_sibling() -> None:
    thinker = told(1.0, THOUGHT)
    assert sibling_hint(thinker, SiblingConfig()) == Hint(THOUGHT, "4")
    assert sibling_hint(thinker, SiblingConfig(remove_thinking=True)) == Hint("It is \\boxed{4}.", "4")
    assert sibling_hint(told(0.0, "no box"), SiblingConfig()) == Hint("no box", "")
    only_thoughts = group([told(0.0), told(1.0, "<think>\\boxed{4}</think> ")])
    assert right_siblings(only_thoughts, 0, SiblingConfig(remove_thinking=True)) == []


def test_draws_are_uniform_and_know_no_order() -> None:
    candidates = [sample(1.0, token_ids=ids) for ids in ([1], [2], [3, 3], [3, 3], [4])]
    counts: Counter[int] = Counter()
    for seed in range(3000):
        (drawn,) = draw(candidates, 1, TARGET, seed, "p/1")
        counts[drawn.completion.token_ids[0]] += 1
        (turned,) = draw(candidates[::-1], 1, TARGET, seed, "p/1")
        assert turned.completion.token_ids.tolist() == drawn.completion.token_ids.tolist()
    assert all(abs(counts[token] - expected) < 120 for token, expected in {1: 600, 2: 600, 3: 1200, 4: 600}.items())


def test_each_target_has_its_own_draw() -> None:
    candidates = [sample(0.0, token_ids=[i]) for i in range(4)]
    drawn = [draw(candidates, 1, sample(1.0, token_ids=[100 + i]), 0)[0].completion.token_ids[0] for i in range(40)]
    assert set(drawn) == {0, 1, 2, 3}


def test_no_candidate_is_drawn_twice_and_few_are_all() -> None:
    candidates = [sample(0.0) for _ in range(6)]
    assert len({id(s) for s in draw(candidates, 4, TARGET, 1)}) == 4
    assert len(draw(candidates[:2], 4, TARGET, 1)) == 2 and draw([], 1, TARGET, 1) == []
    pairs = {frozenset(id(s) for s in draw(candidates, 2, TARGET, seed)) for seed in range(300)}
    assert len(pairs) == 15


def test_the_first_successful_sibling_and_the_samples_own_feedback() -> None:
    made = group([told(0.0, feedback="zero"), told(1.0, THOUGHT), told(1.0, "later"), told(0.0)])
    shown = [demonstration(made, s, DemonstrationConfig()) for s in range(4)]
    first = Hint("It is \\boxed{4}.")
    assert shown == [Hint(first.attempt, "", "zero"), Hint("later"), first, first]


def test_sources_of_demonstrations() -> None:
    made = group([told(0.0, feedback="zero"), told(1.0)])
    by_sibling, by_feedback = (DemonstrationConfig(sources=[source]) for source in ("sibling", "feedback"))
    assert [demonstration(made, s, by_sibling) for s in (0, 1)] == [Hint("it is \\boxed{4}"), None]
    assert [demonstration(made, s, by_feedback) for s in (0, 1)] == [Hint(feedback="zero"), None]
    assert (by_sibling.shows, by_feedback.shows) == ({"attempt"}, {"feedback"})
    with pytest.raises(ValidationError, match="at least 1 item"):
        DemonstrationConfig(sources=[])
