"""The order is a function of seed and step, walks every task in full epochs, and repeats nobody within a batch."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hdpo.data.order import ProblemOrder, spaced_shuffle
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.problem import Problem


def problems(**sizes):
    return [Problem(f"{task}/{i}", task, f"{task} {i}", "1") for task, size in sizes.items() for i in range(size)]


def ids(batch):
    return [problem.id for problem in batch]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.integers(0, 40))
def test_a_resumed_order_equals_an_uninterrupted_one(count, size, seed, step):
    walked = ProblemOrder(problems(a=count, b=7), {"a": 1.0, "b": 0.3}, seed)
    uninterrupted = [ids(walked.batch(s, size)) for s in range(step + 1)]
    assert ids(ProblemOrder(problems(a=count, b=7), {"a": 1.0, "b": 0.3}, seed).batch(step, size)) == uninterrupted[-1]
    assert ids(walked.batch(step // 2, size)) == uninterrupted[step // 2]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5))
def test_batches_repeat_nobody_while_there_are_enough(count, size, seed):
    order = ProblemOrder(problems(a=count), seed=seed)
    for step in range(12):
        batch = ids(order.batch(step, size))
        assert len(batch) == size
        assert max(Counter(batch).values()) == -(-size // count)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(5, 30), st.floats(0.01, 10)), min_size=1, max_size=5), st.integers(1, 16))
def test_shares_are_kept_over_time_and_epochs_are_complete(tasks, size):
    sizes = {f"t{i}": count for i, (count, _) in enumerate(tasks)}
    weights = {f"t{i}": weight for i, (_, weight) in enumerate(tasks)}
    order, steps = ProblemOrder(problems(**sizes), weights, seed=3), 40
    seen = Counter(problem_id for step in range(steps) for problem_id in ids(order.batch(step, size)))
    assert sum(seen.values()) == steps * size
    for task, count in sizes.items():
        of_task = [seen[f"{task}/{i}"] for i in range(count)]
        expected = steps * size * weights[task] / sum(weights.values())
        assert abs(sum(of_task) - expected) <= len(tasks)
        assert max(of_task) - min(of_task) <= 1


def test_without_weights_all_problems_are_seen_equally_often():
    order = ProblemOrder(problems(a=90, b=10))
    seen = Counter(problem_id for step in range(10) for problem_id in ids(order.batch(step, 20)))
    assert set(seen.values()) == {2}


def test_epochs_and_seeds_differ():
    order = ProblemOrder(problems(a=50))
    epochs = [tuple(ids(order.batch(step, 50))) for step in range(4)]
    assert len(set(epochs)) == 4
    assert ids(ProblemOrder(problems(a=50), seed=1).batch(0, 50)) != list(epochs[0])
    firsts = {ids(ProblemOrder(problems(a=50), seed=seed).batch(0, 1))[0] for seed in range(200)}
    assert len(firsts) > 40


@given(st.integers(1, 40), st.data())
def test_spaced_shuffle_keeps_its_distance(count, data):
    spacing = data.draw(st.integers(1, count))
    rng = random.Random(data.draw(st.integers(0, 99)))
    previous = spaced_shuffle(count, [], spacing, rng)
    following = spaced_shuffle(count, previous, spacing, rng)
    assert sorted(previous) == sorted(following) == list(range(count))
    both = previous + following
    for start in range(2 * count - spacing + 1):
        assert len(set(both[start : start + spacing])) == spacing


def test_late_steps_are_found_without_recursion():
    assert len(ProblemOrder(problems(a=3)).batch(10_000, 2)) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProblemOrder([]), "no problems"),
        (lambda: ProblemOrder(problems(a=2), {"b": 1.0}), "weights name tasks without problems: b"),
        (lambda: ProblemOrder(problems(a=2), {"a": 0.0}), "weights must be positive"),
        (lambda: ProblemOrder(problems(a=2)).batch(-1, 2), "step must be 0 or more"),
    ],
)
def test_wrong_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert issubclass(DataError, ValueError)


def test_a_batch_that_would_repeat_a_problem_is_refused():
    ProblemOrder(problems(a=4, b=12)).check_size(16)
    ProblemOrder(problems(a=4, b=12), {"a": 1, "b": 3}).check_size(16)
    with pytest.raises(DataError, match=r"task 'a': a step takes 4\.25 of its 4 problems"):
        ProblemOrder(problems(a=4, b=12)).check_size(17)
    with pytest.raises(DataError, match=r"'a': a step takes 8 of its 4 problems, .*prompts_per_step \(16\)"):
        ProblemOrder(problems(a=4, b=12), {"a": 1, "b": 1}).check_size(16)
