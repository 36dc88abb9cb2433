import json
import logging
import math
import multiprocessing
import time

import numpy as np
import pytest
import torch

from megatron_hdpo.tracking.metrics import MetricsFileError, MetricsWriter, read_metrics


def steps(path):
    return [record["step"] for record in read_metrics(path)]


def test_one_line_per_step_and_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"rollout/reward_mean": 0.5, "distill/tokens": 12, "eval/gsm/pass@4": np.float32(0.25)})
    # Read before close: a killed run must leave its numbers.
    (record,) = read_metrics(tmp_path)
    assert record["rollout/reward_mean"] == 0.5
    assert record["distill/tokens"] == 12 and isinstance(record["distill/tokens"], int)
    assert record["eval/gsm/pass@4"] == 0.25
    writer.write(2, {"train/lr": torch.tensor(1e-6, dtype=torch.float64)})
    assert read_metrics(tmp_path / "metrics.jsonl")[1]["train/lr"] == 1e-6
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="after close"):
        writer.write(3, {})


def test_nan_and_infinity_are_null_and_counted(tmp_path, caplog):
    writer = MetricsWriter(tmp_path)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 13):
            writer.write(step, {"train/grad_norm": math.nan, "distill/divergence": -math.inf if step == 1 else 0.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert all(record["train/grad_norm"] is None for record in read_metrics(tmp_path))
    assert writer.nonfinite == {"train/grad_norm": 12, "distill/divergence": 1}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3  # grad_norm the 1st and the 10th time, divergence once
    assert any("train/grad_norm" in line and "10 so far" in line for line in said)


@pytest.mark.parametrize(
    ("metrics", "error", "message"),
    [
        ({"reward": 1.0}, ValueError, "room/name"),
        ({"rollout/": 1.0}, ValueError, "room/name"),
        ({"rollout/a b": 1.0}, ValueError, "room/name"),
        ({"rollout/reward": "0.5"}, TypeError, "rollout/reward.*str"),
        ({"rollout/reward": None}, TypeError, "NoneType"),
        ({"rollout/reward": np.zeros(3)}, TypeError, r"shape \(3,\)"),
    ],
)
def test_wrong_metrics_are_refused_and_leave_no_line(tmp_path, metrics, error, message):
    writer = MetricsWriter(tmp_path)
    with pytest.raises(error, match=message):
        writer.write(1, {"train/lr": 1.0, **metrics})
    assert read_metrics(tmp_path) == []


def test_second_write_of_a_step_is_merged_and_going_back_refused(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"train/lr": 1.0})
    writer.write(2, {"train/lr": 2.0, "train/loss": 3.0})
    writer.write(2, {"eval/pass@1": 0.5, "train/loss": 4.0})
    writer.write(3, {"train/lr": 3.0})
    assert steps(tmp_path) == [1, 2, 3]
    second = read_metrics(tmp_path)[1]
    assert (second["train/lr"], second["train/loss"], second["eval/pass@1"]) == (2.0, 4.0, 0.5)
    with pytest.raises(ValueError, match="step 2 after step 3"):
        writer.write(2, {})


def test_resume_moves_later_steps_aside(tmp_path):
    with_lines(tmp_path, [1, 2, 3, 4, 5])
    writer = MetricsWriter(tmp_path, resume_step=3)
    assert steps(tmp_path) == [1, 2, 3]
    assert steps(tmp_path / "metrics.superseded.jsonl") == [4, 5]
    writer.write(4, {"train/lr": 40.0})
    assert [record["train/lr"] for record in read_metrics(tmp_path)] == [1.0, 2.0, 3.0, 40.0]
    writer.close()
    MetricsWriter(tmp_path, resume_step=3).close()  # a second crash and resume adds to what is aside
    moved = (tmp_path / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["train/lr"] for line in moved] == [4.0, 5.0, 40.0]


def test_resume_merges_into_the_line_it_resumed_at(tmp_path):
    with_lines(tmp_path, [1, 2])
    MetricsWriter(tmp_path, resume_step=2).write(2, {"eval/pass@1": 0.5})
    assert read_metrics(tmp_path)[1]["train/lr"] == 2.0
    assert read_metrics(tmp_path)[1]["eval/pass@1"] == 0.5


def test_fresh_start_moves_everything_aside(tmp_path):
    with_lines(tmp_path, [0, 1])
    MetricsWriter(tmp_path).write(0, {"train/lr": 7.0})
    assert [record["train/lr"] for record in read_metrics(tmp_path)] == [7.0]
    assert steps(tmp_path / "metrics.superseded.jsonl") == [0, 1]


def test_torn_last_line_is_not_read_and_moved_at_resume(tmp_path):
    with_lines(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "train/l')
    assert steps(tmp_path) == [1, 2]
    writer = MetricsWriter(tmp_path, resume_step=3)
    writer.write(3, {"train/lr": 3.0})
    assert steps(tmp_path) == [1, 2, 3]
    assert (tmp_path / "metrics.superseded.jsonl").read_text() == '{"step": 3, "train/l\n'


@pytest.mark.parametrize("line", ["oops", "[1]", '{"train/lr": 1.0}', '{"step": "3"}', '{"step": 2}'])
def test_foreign_line_is_an_error_with_file_and_line(tmp_path, line):
    with_lines(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(MetricsFileError, match=r"metrics\.jsonl, line 3"):
        read_metrics(tmp_path)
    with pytest.raises(MetricsFileError, match="line 3"):  # and a resumed run does not throw the file away
        MetricsWriter(tmp_path, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_text().endswith(line + "\n")


def _write_forever(folder):
    writer = MetricsWriter(folder)
    for step in range(1, 10**9):
        writer.write(step, {"train/lr": step})


def _has_lines(path, count):
    return path.exists() and path.read_bytes().count(b"\n") >= count


def test_killed_writer_leaves_only_whole_lines(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_write_forever, args=(tmp_path,))
    process.start()
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not _has_lines(tmp_path / "metrics.jsonl", 50):
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("}\n")
    assert text.count("\n") >= 50 and steps(tmp_path) == list(range(1, text.count("\n") + 1))


def with_lines(folder, wanted):
    writer = MetricsWriter(folder)
    for step in wanted:
        writer.write(step, {"train/lr": float(step)})
    writer.close()
