import base64
import gzip
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_hdpo.sampling.saved import write_groups
from megatron_hdpo.tracking.console import Console
from megatron_hdpo.tracking.metrics import MetricsFileError, MetricsWriter, read_metrics
from megatron_hdpo.tracking.names import parse_pass_at, parse_phase, step_seconds
from megatron_hdpo.tracking.plot_parts import PlainTicks, binned, running_mean
from megatron_hdpo.tracking.plots import draw_report
from megatron_hdpo.tracking.report import ReportError, write_report
from megatron_hdpo.tracking.samples import pick_samples
from megatron_hdpo.tracking.summary import summarise
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, Group, Sample

STEPS = {
    0: {"eval/pass@1": 0.25, "eval/gsm/pass@4": 0.5, "time/evaluation_s": 2.0, "time/step_s": 2.0},
    1: {
        "rollout/reward_mean": 0.2,
        "rollout/cliff_rate": 0.5,
        "privileged/success_rate": 0.75,
        "distill/tokens": 1000,
        "distill/divergence": 0.08,
        "distill/covered_mass": 0.9,
        "train/grad_norm": 2.0,
        "train/entropy": 0.9,
        "time/rollout_s": 3.0,
        "time/train_s": 4.0,
        "time/step_s": 8.0,
    },
    2: {"rollout/reward_mean": 0.4, "train/grad_norm": math.nan, "time/rollout_s": 5.0, "time/step_s": 10.0},
    3: {"rollout/reward_mean": 0.3, "train/grad_norm": 1.0, "eval/pass@1": 0.5, "distill/tokens": 0},
}


def write_run(folder, steps):
    writer = MetricsWriter(folder)
    for step, metrics in steps.items():
        writer.write(step, metrics)
    writer.close()


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my <run>"
    write_run(folder, STEPS)
    return folder


def save_rollouts(run, name, groups):
    path = run / "rollouts" / name
    write_groups(path, dict(enumerate(groups)), len(groups), decode=lambda ids: f"prompt of {len(ids)} ids")


def group(question, rewards, privileged=()):
    return Group(
        problem=Problem(id="t/0", task="t", question=question, answer="4"),
        prompt_ids=np.zeros(3, np.int32),
        samples=[sample(f"{question} rollout {reward}", reward) for reward in rewards],
        privileged_prompt_ids=np.zeros(7, np.int32) if privileged else None,
        privileged_samples=[sample(f"{question} shown {reward}", reward) for reward in privileged],
    )


def sample(text, reward):
    ids = np.zeros(2, np.int32)
    return Sample(Completion(ids, np.zeros(2, np.float32), "stop", ids), text, reward)


def test_tables_say_before_after_first_last_mean(run):
    evaluation, training, seconds = summarise(read_metrics(run))
    assert evaluation.rows == [
        {
            "set": "held-out",
            "metric": "pass@1",
            "before": "0.250",
            "after": "0.500",
            "change": "+0.250",
            "best": "0.500 at step 3",
            "steps": "0 to 3",
        },
        {"set": "gsm", "metric": "pass@4", "before": "0.500", "after": "-", "change": "-", "best": "-", "steps": "0"},
    ]
    rows = {row.pop("metric"): row for row in training.rows}
    assert rows["Mean reward"] == {"first": "0.200", "last": "0.300", "mean": "0.300", "steps": "3"}
    # A step without the number (or with NaN) is no zero in the mean; a step with 0 tokens is.
    assert rows["Gradient norm"] == {"first": "2", "last": "1", "mean": "1.5", "steps": "2"}
    assert rows["Tokens distilled per step"] == {"first": "1,000", "last": "0", "mean": "500", "steps": "2"}
    phases = {row.pop("phase"): row for row in seconds.rows}
    assert phases["rollout"] == {"first": "3.00", "last": "5.00", "mean": "4.00", "total": "8.0", "share": "40.0%"}
    assert phases["whole step"]["total"] == "20.0" and phases["whole step"]["share"] == "100.0%"
    assert list(phases) == ["rollout", "train", "evaluation", "whole step"]


def test_evaluation_shows_intervals_where_a_step_has_them(tmp_path):
    first = {"eval/gsm/pass@1": 0.25, "eval/gsm/pass@1_low": 0.125, "eval/gsm/pass@1_high": 0.5}
    write_run(tmp_path, {0: first, 2: {"eval/gsm/pass@1": 0.5}})
    (row,) = summarise(read_metrics(tmp_path))[0].rows
    assert (row["before"], row["after"], row["change"]) == ("0.250 (0.125 to 0.500)", "0.500", "+0.250")


def test_the_best_evaluation_is_shown_with_its_first_step(tmp_path):
    values = {0: 0.25, 1: 0.625, 2: 0.5, 3: 0.625, 4: 0.5}
    records = {step: {"eval/gsm/pass@1": value} for step, value in values.items()}
    records[1] |= {"eval/gsm/pass@1_low": 0.5, "eval/gsm/pass@1_high": 0.75, "eval/gsm/pass@1_problems": 64}
    write_run(tmp_path, records)
    (row,) = summarise(read_metrics(tmp_path))[0].rows
    assert row["best"] == "0.625 (0.500 to 0.750) at step 1"


def test_accuracy_by_level_has_a_table(tmp_path):
    name = "eval/gsm/accuracy/level"
    of_one = {f"{name}-1": 0.5, f"{name}-1_low": 0.25, f"{name}-1_high": 0.75, f"{name}-1_problems": 4}
    write_run(tmp_path, {0: of_one | {f"{name}-10": 0.25}, 2: {f"{name}-1": 0.75, f"{name}-10": 0.0}})
    (table,) = summarise(read_metrics(tmp_path))
    assert table.title == "Accuracy by level and source"
    assert [(row["set"], row["metric"], row["after"], row["best"]) for row in table.rows] == [
        ("gsm", "level-1", "0.750", "0.750 at step 2"),
        ("gsm", "level-10", "0.000", "0.250 at step 0"),
    ]


def test_servers_are_shown_over_the_steps(tmp_path):
    """22 steps at half of the servers must be seen without the log."""
    well = {"servers/all": 2, "servers/in_use": 2, "servers/lost_tokens": 0, "servers/cache_hit_rate": 0.5}
    write_run(
        tmp_path,
        {
            0: {"rollout/generation_failed": 9},  # no servers in this line
            1: {**well, "rollout/privileged_generation_failed": 0},
            2: {**well, "servers/in_use": 1, "servers/lost_tokens": 1200, "rollout/privileged_generation_failed": 3},
            3: {"servers/all": 2, "servers/in_use": 1, "servers/lost_tokens": 30},
        },
    )
    use, trouble = (table for table in summarise(read_metrics(tmp_path)) if "ervers" in table.title)
    rows = {row.pop("metric"): row for row in use.rows}
    assert rows["Servers in use after the rollouts"] == {
        "mean": "1.3",
        "last": "1.0",
        "lowest": "1.0 (step 2)",
        "highest": "2.0 (step 1)",
    }
    assert rows["Share of prompt tokens from the prefix cache"]["mean"] == "50.0%"
    assert "Tokens per second, while servers sample" not in rows
    rows = {row.pop("what"): row for row in trouble.rows}
    assert rows["Tokens thrown away"] == {"total": "1,230", "steps": "2 of 3", "most": "1,200 (step 2)"}
    assert rows["Privileged rollouts lost"] == {"total": "3", "steps": "1 of 2", "most": "3 (step 2)"}
    assert "Student rollouts lost" not in rows


def test_a_run_without_servers_has_no_table_of_them(run):
    assert not [table for table in summarise(read_metrics(run)) if "ervers" in table.title]


def test_final_table_on_the_console(run):
    stream = io.StringIO()
    write_report(run).show(Console(True, stream=stream))
    text = stream.getvalue()
    for expected in ("Evaluation", "pass@1", "+0.250", "Cliff rate", "Divergence", "whole step", "report.html"):
        assert expected in text


class Page(HTMLParser):
    """Checks that tags nest; collects text and what the page would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.loads = [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for key, value in attributes if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_is_complete_self_contained_and_escaped(run):
    attack = "<script>alert('x')</script>"
    (run / "recipe.yaml").write_text("model:\n  path: '<b>&amp;'\n")
    save_rollouts(run, "step_9.rank_0.jsonl.gz", [group("old question", [0.0])])
    save_rollouts(run, "step_10.rank_0.jsonl.gz", [group("easy", [1.0, 0.0]), group(attack, [0.0], [0.0, 1.0])])
    with gzip.open(run / "rollouts" / "step_10.rank_0.jsonl.gz", "at") as file:
        file.write("{oops")
    report = write_report(run)
    page = Page(report.html.read_text(encoding="utf-8"))
    assert "script" not in page.tags and "b" not in page.tags
    for expected in (
        "my <run>",
        attack,
        "path: '<b>&amp;'",
        f"{attack} shown 1.0",
        "prompt of 7 ids",
        "easy rollout 0.0",
        "pass@4",
    ):
        assert expected in page.text
    assert "old question" not in page.text  # the newest file, also where numbers are not padded
    assert "step_10.rank_0.jsonl.gz, line 3: not a saved group" in page.text
    assert "Steps 0 to 3" in page.text
    (source,) = page.loads
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == report.png.read_bytes()


def test_samples_show_best_and_worst_and_privileged_groups_first(tmp_path):
    save_rollouts(tmp_path, "step_1.rank_0.jsonl.gz", [group("solved", [1.0, 1.0])] * 2)
    lines = [group("solved", [1.0, 1.0])] * 3 + [group("cliff", [0.0, 0.0], [1.0, 0.0])]
    save_rollouts(tmp_path, "step_1.rank_1.jsonl.gz", lines)
    groups, notes = pick_samples(tmp_path / "rollouts")
    assert len(groups) == 4 and notes == []
    assert [(sample.kind, sample.reward) for sample in groups[0].samples] == [
        ("rollout", 0.0),
        ("privileged rollout", 1.0),
        ("privileged rollout", 0.0),
    ]
    assert groups[0].source == "rollouts/step_1.rank_1.jsonl.gz, line 4"
    assert pick_samples(tmp_path / "none") == ([], [])


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder / "nowhere", "no such folder"),
        (lambda folder: folder, r"no metrics\.jsonl in it"),
        (
            lambda folder: (folder / "metrics.jsonl").touch() or folder,
            "no finished step yet|no finished step in it yet",
        ),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"step": 1') and folder, "no finished step"),
    ],
)
def test_nothing_to_report_is_a_clear_error(tmp_path, prepare, message):
    folder = prepare(tmp_path)
    with pytest.raises(ReportError, match=message):
        write_report(folder)
    assert not (tmp_path / "report.png").exists() and not (tmp_path / "report.html").exists()


def test_damaged_record_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("oops\n")
    with pytest.raises(MetricsFileError, match="line 1"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "steps",
    [
        {0: {"eval/pass@1": 0.5}},
        {1: {"train/lr": 1.0}},
        {1: {"train/grad_norm": math.nan, "rollout/reward_mean": math.inf}},
        {
            1: {"rollout/reward_mean": -3.0, "train/grad_norm": 1e-3},
            5: {"train/grad_norm": 0.0},
            9: {"distill/tokens": 0},
        },
    ],
)
def test_sparse_runs_still_give_a_report(tmp_path, steps):
    write_run(tmp_path, steps)
    assert "report" in write_report(tmp_path).html.read_text()


def has_color(image, color):
    wanted = np.array([int(color[index : index + 2], 16) for index in (1, 3, 5)]) / 255
    return bool((np.abs(image[..., :3] - wanted).max(-1) < 0.02).any())


def panels(records):
    image = imread(io.BytesIO(draw_report(records)))
    height, width = image.shape[:2]
    return [
        image[row * height // 2 : (row + 1) * height // 2, column * width // 3 : (column + 1) * width // 3]
        for row in range(2)
        for column in range(3)
    ]


@pytest.mark.parametrize(
    ("metric", "panel", "color"),
    [
        ("rollout/reward_mean", 0, "#0072B2"),
        ("rollout/cliff_rate", 0, "#D55E00"),
        ("eval/pass@1", 1, "#0072B2"),
        ("privileged/success_rate", 2, "#009E73"),
        ("distill/divergence", 3, "#CC79A7"),
        ("distill/covered_mass", 3, "#0072B2"),
        ("train/grad_norm", 4, "#D55E00"),
        ("train/entropy", 4, "#009E73"),
        ("time/rollout_s", 5, "#0072B2"),
    ],
)
def test_each_metric_is_drawn_in_its_panel_and_nowhere_else(metric, panel, color):
    # Points around a plain axis label: absent metrics leave no mark of that colour.
    records = [{"step": step, "time": 0.0, metric: 0.5} for step in range(1, 4)]
    drawn = [index for index, image in enumerate(panels(records)) if has_color(image, color)]
    assert drawn == [panel]


@pytest.mark.parametrize("divergence", [0.08, 1e-9, 123.0])
def test_no_text_overlaps_in_a_full_figure(monkeypatch, divergence):
    from matplotlib.text import Text

    drawn, sizes, plain = {}, set(), Text.draw

    def draw(self, renderer):
        plain(self, renderer)
        if self.get_text().strip() and self.get_visible():
            drawn[id(self)] = (self, self.get_text(), self.get_window_extent(renderer))
            sizes.add(renderer.get_canvas_width_height())

    monkeypatch.setattr(Text, "draw", draw)
    full = {"time/privileged_rollout_s": 1.0, "time/weight_sync_s": 0.5, "time/teacher_s": 0.7, "time/judge_s": 0.6}
    evals = {f"eval/{name}/pass@{k}": 0.1 * k for name in ("gsm", "chain_sum") for k in (1, 4, 8)}
    records = [{"step": step, "time": 0.0, **STEPS[1], **full, **evals} for step in range(120)]
    records[7]["train/grad_norm"] = 5000.0
    for record in records:
        record["distill/divergence"] = divergence * (1 + record["step"])
        record["distill/tokens"] = 5e6 * divergence
    draw_report(records)
    ((width, height),) = sizes
    boxes = [(label, box) for _, label, box in drawn.values()]
    assert len(boxes) > 80
    for index, (label, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, label
        for other, other_box in boxes[index + 1 :]:
            assert not box.padded(-1).overlaps(other_box.padded(-1)), (label, other)


def test_running_mean_and_bins_against_plain_loops():
    values = np.random.default_rng(0).normal(size=57)
    expected = [values[max(0, end - 7) : end].mean() for end in range(1, 58)]
    np.testing.assert_allclose(running_mean(values, 7), expected)
    steps = [step for step in range(3, 203) if step % 10]
    centres, (means,), width = binned(steps, [steps])
    assert width == 4 and centres[0] == 4.5
    assert means[0] == 4.5 and means[1] == np.mean([7, 8, 9])  # steps 3..6, then 7..9 as 10 is absent
    centres, (means,), width = binned([0, 5, 10], [[1.0, 2.0, 3.0]])
    assert list(centres) == [0, 5, 10] and list(means) == [1, 2, 3] and width == 5


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0.0, 0.5, 1.0], ["0", "0.5", "1.0"]),
        ([0.85, 0.9, 0.95], ["0.85", "0.90", "0.95"]),
        ([0.99990, 0.99995], ["0.99990", "0.99995"]),
        ([-1.0, 0.0, 1.0], ["-1", "0", "1"]),
        ([0.0, 800.0, 1600.0], ["0", "800", "1600"]),
        ([0.0, 2500.0, 12500.0], ["0", "2.5k", "12.5k"]),
        ([0.0, 1e7, 2e7], ["0", "10M", "20M"]),
        ([0.0, 2e-8, 1.2e-7], ["0", "2e-8", "1.2e-7"]),
        ([1e12], ["1e12"]),
    ],
)
def test_tick_labels(ticks, labels):
    assert PlainTicks().format_ticks(ticks) == labels


def test_names():
    assert parse_pass_at("eval/pass@16") == ("", 16)
    assert parse_pass_at("eval/gsm/hard/pass@4") == ("gsm/hard", 4)
    assert parse_pass_at("eval/greedy") is None
    assert parse_phase("time/weight_sync_s") == "weight_sync"
    assert parse_phase("time/step_s") is None and parse_phase("train/lr") is None
    assert step_seconds({"time/a_s": 1.0, "time/b_s": 2.0}) == 3.0
    assert step_seconds({"time/a_s": 1.0, "time/step_s": 9.0}) == 9.0
    assert step_seconds({}) is None
    assert re.fullmatch(r"eval/(.+/)?pass@\d+", "eval/pass@1")
