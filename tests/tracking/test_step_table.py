"""Rows of steps: their width, their columns, and numbers that would not fit."""

from __future__ import annotations

import math

import pytest

from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.registry import OBJECTIVES, build_objective
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.tracking.step_table import StepTable
from megatron_hdpo.types.headline import CLIFF_RATE, GRADIENT_NORM, Headline

VALUES = [0.0, 1.0, -0.1234, 12345.678, -98765.4321, 1e-7, -1e-7, 1.5e12, -1e100, math.inf, -math.inf, math.nan, None]


@pytest.mark.parametrize("config", OBJECTIVES, ids=lambda config: config.__name__)
@pytest.mark.parametrize("width", [80, 120, 160])
def test_no_row_is_wider_than_the_screen_and_columns_line_up(config: type[ObjectiveSettings], width: int) -> None:
    headlines = build_objective(config(), ObjectiveDeps()).headlines
    table = StepTable(headlines, 20_000, width)
    known = {"train/grad_norm", "rollout/truncated_rate", "train/lr"} | {headline.name for headline in headlines}
    assert len(table.columns) == min({80: 7, 120: 11, 160: 16}[width], 4 + len(known))
    assert [column.short for column in table.columns[:4]] == ["reward", *(one.short for one in headlines[:3])]
    assert table.header.split()[-2 - (width >= 120) :][0] == "seconds"
    for value in VALUES:
        row = table.row(19_999, {column.name: value for column in table.columns}, 1e7, 1e7)
        assert len(row) == len(table.header) <= width
        assert len(row.split()) == len(table.columns) + 2 + (width >= 120)


def test_a_wide_screen_shows_more() -> None:
    headlines = build_objective(next(iter(OBJECTIVES))(), ObjectiveDeps()).headlines
    assert set(StepTable(headlines, 10, 80).columns) < set(StepTable(headlines, 10, 120).columns)


def test_the_numbers_of_a_row() -> None:
    table = StepTable([CLIFF_RATE, GRADIENT_NORM, Headline("own/x", "own", "Own", ".1%")], 2000, 80)
    metrics = {
        "rollout/reward_mean": 0.25, "rollout/cliff_rate": 0.5, "train/grad_norm": 12.3456, "own/x": 0.125,
        "rollout/response_tokens": 123.45, "perf/step_tokens_per_s_per_gpu": 1234.5,
        "time/rollout_s": 3.0, "time/train_s": 4.5,
    }  # fmt: skip
    assert table.header.split() == ["step", "reward", "cliffs", "grad", "own", "length", "tok/s", "seconds", "left"]
    row = table.row(7, metrics, 60.0, 7200.0)
    assert row.split() == ["7/2000", "0.250", "0.500", "12.3", "12.5%", "123.5", "1,234", "7.5", "2h00m"]
    assert table.row(8, {}, 60.0, None).split() == ["8/2000", *["-"] * 8]


def test_the_legend_explains_every_column_and_the_dash() -> None:
    table = StepTable([CLIFF_RATE], 10, 80)
    assert table.legend.startswith("columns: reward = mean reward; cliffs = cliff rate (share of prompts); ")
    assert all(f"{column.short} = " in table.legend for column in table.columns)
    assert table.legend.endswith("left = estimate for the rest of the run; - = not measured")
