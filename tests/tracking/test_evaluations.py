"""Evaluations on the console: intervals, and the best so far."""

from __future__ import annotations

from typing import Any

from megatron_hdpo.tracking.evaluations import Evaluations, evaluation_lines


def metrics(**shares: float) -> dict[str, Any]:
    """Return the metrics of an evaluation of the set `gsm`, by `pass@k` with "at" for "@"."""
    found: dict[str, Any] = {"eval/gsm/reward_mean": 0.1, "eval/gsm/problems": 8.0, "rollout/reward_mean": 0.3}
    for name, value in shares.items():
        share = f"eval/gsm/{name.replace('_at_', '@')}"
        found |= {share: value, f"{share}_low": value - 0.05, f"{share}_high": value + 0.05}
    return found


def test_shares_have_their_interval_and_the_best_so_far() -> None:
    evaluations = Evaluations()
    first = evaluations.add(0, metrics(pass_at_1=0.2, pass_at_8=0.5, greedy=0.1))
    assert [(one.dataset, one.share, one.value) for one in first] == [
        ("gsm", "pass@1", 0.2), ("gsm", "pass@8", 0.5), ("gsm", "greedy", 0.1)
    ]  # fmt: skip
    assert evaluations.add(5, {"rollout/reward_mean": 0.5}) == []
    evaluations.add(10, metrics(pass_at_1=0.4, pass_at_8=0.5))
    last = evaluations.add(20, metrics(pass_at_1=0.3, pass_at_8=0.6))
    assert [(one.best, one.best_step) for one in last] == [(0.4, 10), (0.6, 20)]
    assert evaluation_lines(20, last) == [
        "  set  metric    value  95 % interval   best so far",
        "  gsm  pass@1    0.300  0.250 to 0.350  0.400 after step 10",
        "  gsm  pass@8    0.600  0.550 to 0.650  this one",
    ]


def test_a_resumed_run_knows_what_it_had_reached() -> None:
    records = [{"step": 0, **metrics(pass_at_1=0.7)}, {"step": 1}, {"step": 2, "eval/gsm/pass@1": None}]
    (found,) = Evaluations(records).add(3, metrics(pass_at_1=0.6))
    assert (found.best, found.best_step) == (0.7, 0)
    assert evaluation_lines(3, [found])[1].endswith("0.700 before step 1")


def test_equal_values_do_not_beat_the_first() -> None:
    evaluations = Evaluations([{"step": 4, "eval/pass@1": 0.5}])
    (found,) = evaluations.add(8, {"eval/pass@1": 0.5})
    assert (found.dataset, found.best_step, found.low) == ("", 4, None)
    assert evaluation_lines(8, [found])[1].split() == ["pass@1", "0.500", "-", "0.500", "after", "step", "4"]


def test_long_names_do_not_make_the_table_wider_than_80() -> None:
    name = "a-very-long-name-of-a-set-of-held-out-problems"
    records = [{"step": 1_000_000, f"eval/{name}/pass@128": 1.0}]
    found = Evaluations(records).add(1_000_001, {f"eval/{name}/pass@128": 0.5, f"eval/{name}/pass@128_low": 0.4,
                                                 f"eval/{name}/pass@128_high": 0.6})  # fmt: skip
    lines = evaluation_lines(1_000_001, found)
    assert max(map(len, lines)) <= 80 and "a-very-long-name..." in lines[1]
