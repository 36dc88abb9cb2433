"""The quickstart's decisions: what is skipped, and what it says of what it saw."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import quickstart
from findings import Score, change, score, signal, verdict
from quickstart import Curve, Training, act_one_verdicts, matters, summary, trainings
from relay import Part, Screen

from megatron_hdpo.config import load_recipe
from megatron_hdpo.evaluation.passk import wilson

ROOT = Path(__file__).parents[2]


def of(right: int, total: int = 64, lost: int = 0) -> Score:
    return Score(wilson(right, total), lost)


@pytest.mark.parametrize(
    ("hdpo", "grpo", "said"),
    [
        (of(30), of(2), "s: HDPO solves more than GRPO (HDPO 47 % (35 to 59 %), GRPO 3 % (1 to 11 %); the 95 %"),
        (of(2), of(30), "s: GRPO solves more than HDPO (HDPO 3 % (1 to 11 %), GRPO 47 % (35 to 59 %); the 95 %"),
        (of(8), of(5), "s: no clear difference (HDPO 12 % (6 to 23 %), GRPO 8 % (3 to 17 %); the 95 % intervals"),
        (of(0), of(0), "s: no clear difference (HDPO 0 % (0 to 6 %), GRPO 0 % (0 to 6 %); the 95 % intervals"),
        (of(30), of(2, lost=3), "s: no verdict, because 3 samples of the last evaluation were lost (HDPO 47 %"),
    ],
    ids=["HDPO wins", "GRPO wins", "overlap", "tie", "lost samples"],
)
def test_the_verdict_follows_from_the_intervals(hdpo: Score, grpo: Score, said: str) -> None:
    assert verdict(hdpo, grpo, "s").startswith(said)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (of(1, 20), of(12, 20), "w: more are solved than before (5 % (1 to 24 %) before, 60 % (39 to 78 %) after; the"),
        (of(12, 20), of(1, 20), "w: fewer are solved than before (60 %"),
        (of(4, 20), of(6, 20), "w: no clear change (20 % (8 to 42 %) before, 30 % (15 to 52 %) after; the 95 %"),
        (of(4, 20, lost=2), of(19, 20), "w: no verdict on the change, because 2 samples were lost ("),
    ],
)
def test_the_change_follows_from_the_intervals(before: Score, after: Score, said: str) -> None:
    assert change(before, after, "w").startswith(said)


def test_a_score_counts_problems_and_lost_samples() -> None:
    record = {"eval/a/pass@8": 0.25, "eval/a/problems": 64.0, "eval/a/samples": 510.0}
    found = score(record, "a", "pass@8", 8)
    assert found == Score(wilson(16, 64), 2)
    assert score(record, "b", "pass@8", 8) is None


STEPS = [
    {"step": 0, "privileged/cliff_prompts": 99.0},
    {"step": 1, "privileged/cliff_prompts": 4.0, "privileged/rollouts": 8.0, "privileged/kept": 3.0},
    {"step": 2, "privileged/cliff_prompts": 2.0, "privileged/rollouts": 4.0, "distill/tokens": 1234.0},
]


def test_the_signal_is_counted_over_the_steps() -> None:
    assert signal(STEPS, 6) == (
        "6 of 12 prompts of its 2 steps were cliffs, from which GRPO learns nothing; with the solution in the prompt "
        "3 of 12 rollouts were right and kept, and HDPO learned from 1,234 of their tokens."
    )
    assert signal(STEPS[:2], 6).endswith("3 of 8 rollouts were right and kept: HDPO had none, too.")
    assert signal([{"step": 1}], 6).endswith("learns nothing; none of them was tried again.")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the recipes and nothing else."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "quickstart").symlink_to(ROOT / "examples" / "quickstart")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_records(training: Training, *records: dict[str, Any]) -> None:
    training.output.mkdir(parents=True, exist_ok=True)
    (training.output / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def evaluation(step: int, right: dict[str, int], problems: int = 64, samples: int = 8) -> dict[str, Any]:
    record: dict[str, Any] = {"step": step}
    for name, count in right.items():
        record |= {f"eval/{name}/pass@{samples}": count / problems, f"eval/{name}/problems": problems}
        record[f"eval/{name}/samples"] = problems * samples
    return record


class Commands:
    """Stands in for `relay.run`: notes what would be run."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, screen: Screen, *parts: Part, on_tick: Any = None) -> float:
        self.names += [part.name for part in parts]
        return 1.0


def test_complete_runs_are_skipped_and_others_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands()
    monkeypatch.setattr(quickstart, "run", commands)
    grpo, hdpo, _ = trainings()
    write_records(grpo, evaluation(0, {"cliffs": 1}))
    hdpo.output.mkdir(parents=True)
    screen = Screen(io.StringIO())
    quickstart.train(screen, grpo, hdpo)
    assert commands.names == ["GRPO", "HDPO"]
    said = screen.stream.getvalue()
    assert "GRPO goes on: " in said and "HDPO starts: " in said
    quickstart.train(screen, grpo, hdpo)
    assert commands.names == ["GRPO", "HDPO"]
    assert "GRPO is complete: " in screen.stream.getvalue()


def test_a_run_that_failed_is_not_complete(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> float:
        raise quickstart.PartFailed("no")

    monkeypatch.setattr(quickstart, "run", fail)
    grpo, *_ = trainings()
    grpo.output.mkdir(parents=True)
    with pytest.raises(quickstart.PartFailed):
        quickstart.train(Screen(io.StringIO()), grpo)
    assert not grpo.is_complete


def test_a_changed_recipe_is_trained_again(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("a: 1\n")
    training = Training("x", folder / "recipe.yaml", folder / "out")
    training.output.mkdir()
    training.complete()
    assert training.is_complete
    assert not Training("x", folder / "recipe.yaml", folder / "out", ("b=2",)).is_complete
    (folder / "recipe.yaml").write_text("a: 2\n")
    assert not training.is_complete


def test_both_methods_of_act_one_differ_in_the_method_alone() -> None:
    grpo, hdpo, _ = trainings()
    ours, theirs = (load_recipe(ROOT / one.recipe, one.arguments).model_dump(mode="json") for one in (hdpo, grpo))
    assert (ours.pop("objective")["name"], theirs.pop("objective")["name"]) == ("hdpo", "grpo")
    assert [key for key in ours if ours[key] != theirs[key]] == ["output", "teacher"]


def test_the_curve_shows_each_evaluation_of_both_once(folder: Path) -> None:
    grpo, hdpo, _ = trainings()
    screen = Screen(io.StringIO())
    curve = Curve(screen, grpo, hdpo, 8)
    curve.show_new()
    assert screen.stream.getvalue() == ""
    write_records(grpo, evaluation(0, {"cliffs": 0}), {"step": 1}, evaluation(5, {"cliffs": 0}))
    write_records(hdpo, evaluation(0, {"cliffs": 0}))
    curve.show_new()
    curve.show_new()
    write_records(hdpo, evaluation(0, {"cliffs": 0}), evaluation(5, {"cliffs": 32}))
    curve.show_new()
    rows = screen.stream.getvalue().strip().splitlines()
    assert rows[1].split() == ["step", "GRPO", "HDPO"]
    assert [row.split()[0] for row in rows[2:]] == ["0", "5"]
    assert " .................... 0 % (0 to 6 %) " in rows[3]
    assert rows[3].endswith(" ##########.......... 50 % (38 to 62 %)")


def test_three_sentences_say_what_was_seen(folder: Path) -> None:
    grpo, hdpo, words = trainings()
    write_records(grpo, evaluation(40, {"cliffs": 20, "taught": 50}))
    write_records(hdpo, evaluation(40, {"cliffs": 2, "taught": 50}))
    name = words.settings["data"]["evaluation"][0]["name"]
    samples = words.settings["evaluation"]["samples"]
    before = evaluation(0, {name: 1}, problems=20, samples=samples)
    after = evaluation(2, {name: 15}, problems=20, samples=samples)
    write_records(words, before, STEPS[1], STEPS[2] | after)
    sentences = summary(grpo, hdpo, words)
    assert len(sentences) == 3
    assert sentences[0].startswith("Act one. Held-out sums of 5 and 6 digits: GRPO solves more than HDPO (")
    assert ": more are solved than before (5 % (1 to 24 %) before, 75 % (" in sentences[1]
    assert "6 of 12 prompts of its 2 steps were cliffs" in sentences[2]
    assert act_one_verdicts(grpo, hdpo)[1].startswith(
        "Held-out sums of 3 digits, which were taught: no clear difference"
    )
    write_records(grpo, {"step": 40})
    assert summary(grpo, hdpo, words)[0].endswith("no verdict, because the last step of a run has no evaluation.")


def test_its_runs_say_every_second_what_they_are_doing() -> None:
    for training in trainings():
        assert load_recipe(ROOT / training.recipe, training.arguments).tracking.progress_seconds <= 1


def test_progress_lines_do_not_stay_on_the_screen() -> None:
    assert matters(" 1/40    0.086") and matters("warning: x")
    assert not matters("[12:00:01] warm-up: 1/8 step (12 %)") and not matters("")
