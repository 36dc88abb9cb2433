"""`compare` and `report` of several runs: the numbers are those of metrics.jsonl, the keys those of recipe.yaml."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from megatron_hdpo import cli
from megatron_hdpo.commands.compared_runs import load_runs, tables
from megatron_hdpo.tracking.report import ReportError


def make_run(folder: Path, values: list[float], recipe: str | None = "seed: 0\n", **more: Any) -> Path:
    """A run with one evaluation per step, whose pass@8 is 0.1 above pass@1, and steps of 2 seconds."""
    folder.mkdir(parents=True)
    lines = []
    for step, value in enumerate(values):
        record = {"step": step, "time": 1.0 + step, "rollout/reward_mean": value / 2, "time/step_s": 2.0}
        for k, rate in ((1, value), (8, value + 0.1)):
            name = f"eval/n3/pass@{k}"
            record |= {name: rate, f"{name}_low": rate - 0.05, f"{name}_high": rate + 0.05}
        lines.append(json.dumps(record | more) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    if recipe is not None:
        (folder / "recipe.yaml").write_text(recipe)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    grpo = make_run(tmp_path / "grpo", [0.1, 0.6, 0.4], "output: a\nseed: 0\nobjective: {name: grpo}\n")
    hdpo = make_run(tmp_path / "hdpo", [0.1, 0.2], "output: b\nseed: 0\nobjective: {name: hdpo, lambda: 2}\n")
    return [grpo, hdpo]


def test_tables_of_two_runs(runs: list[Path]) -> None:
    rates, length, keys = tables(load_runs(runs))
    assert [(row["set"], row["metric"], row["at"]) for row in rates.rows] == [
        ("n3", "pass@1", "last"),
        ("n3", "pass@1", "best"),
        ("n3", "pass@8", "last"),
        ("n3", "pass@8", "best"),
    ]
    assert [row["grpo"] for row in rates.rows[:2]] == [
        "0.400 (0.350 to 0.450), step 2",
        "0.600 (0.550 to 0.650), step 1",
    ]
    assert rates.rows[0]["hdpo"] == rates.rows[1]["hdpo"] == "0.200 (0.150 to 0.250), step 1"
    assert [row["grpo"] for row in length.rows] == ["2", "4.0 s", "2.00", "0.200"]
    assert keys.rows == [
        {"key": "objective.name", "grpo": "grpo", "hdpo": "hdpo"},
        {"key": "objective.lambda", "grpo": "-", "hdpo": "2"},
    ]


def test_what_a_run_lacks_is_a_dash_and_a_lost_recipe_is_said(tmp_path: Path, runs: list[Path]) -> None:
    bare = make_run(tmp_path / "bare", [], None)
    (bare / "metrics.jsonl").write_text('{"step": 1, "time": 1.0}\n')
    rates, length, keys = tables(load_runs([*runs, bare]))
    assert {row["bare"] for row in rates.rows} == {"-"}
    assert [row["bare"] for row in length.rows] == ["1", "-", "-", "-"]
    assert {row["bare"] for row in keys.rows} == {"no recipe"}


def test_compare_draws_a_figure_with_a_panel_per_metric(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures" / "both.png"
    cli.main(["compare", *map(str, runs), "--out", str(out)])
    assert capsys.readouterr().out.endswith(f"figure: {out}\n")
    data = out.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:4] == b"\x89PNG" and (width, height) == (2070, 570)  # three panels in a row


def test_runs_of_one_name_are_told_apart_and_a_run_given_twice_is_refused(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "a" / "run", [0.1]), make_run(tmp_path / "b" / "run", [0.2])
    assert list(load_runs([one, other])) == [str(one), str(other)]
    with pytest.raises(ReportError, match="a run is given twice"):
        load_runs([one, one])
    with pytest.raises(ReportError, match="no such folder"):
        load_runs([tmp_path / "nothing"])


def test_reports_of_several_runs_go_into_a_folder_each(runs: list[Path], tmp_path: Path) -> None:
    cli.main(["report", *map(str, runs), "--out", str(tmp_path / "reports")])
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("reports/*/*")}
    assert written == {f"reports/{run}/report.{kind}" for run in ("grpo", "hdpo") for kind in ("png", "html")}
    assert not list(tmp_path.glob("[gh]*/report.*"))
    cli.main(["report", str(runs[0])])
    assert (runs[0] / "report.html").is_file()
