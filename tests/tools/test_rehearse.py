"""tools/rehearse.py from end to end: a model of four layers on TP 2, PP 2 and EP 2, on the null GPU."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _rehearsal.folder import write_folder
from _rehearsal.launch import interpreter
from null_gpu import needs_null_gpu
from recipes import ROOT

from megatron_hdpo.planner.shapes import SHAPES

pytestmark = [pytest.mark.long, needs_null_gpu]

RECIPE = "examples/qwen2.5-7b/hdpo.yaml"
LAYOUT = "parallel={tensor: 2, pipeline: 2, expert: 2, sequence: true}"
EXPERTS = replace(SHAPES["qwen3-30b-a3b"], num_layers=4, num_experts=16, experts_per_token=4)
# What the plan has in one call, and the program in several: buckets of gradients.
SPLIT = ("all_gather", "reduce_scatter")


def rehearse(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [interpreter(), "tools/rehearse.py", RECIPE, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("rehearsal")
    model, out = write_folder(EXPERTS, folder / "model"), folder / "out.json"
    ended = rehearse(
        LAYOUT, "--model", str(model), "--world", "8", "--micro-batches", "2", "--json", str(out)
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return json.loads(out.read_text())["ranks"]


def test_every_kind_of_rank_gets_to_its_end(ranks: list[dict[str, Any]]) -> None:
    assert [(rank["rank"], rank["stage"]) for rank in ranks] == [(0, 0), (1, 0), (4, 1), (5, 1)]
    wanted = ["load model", "start engine", "prepare", "sync", *["teacher", "train", "sync"] * 2, "save"]
    for rank in ranks:
        assert [phase["phase"] for phase in rank["phases"]] == wanted
        assert rank["saved"] > 0 and rank["failure"] is None


def test_collectives_are_those_of_the_plan(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        wrong = [line for line in rank["lines"] if ": " in line["what"] and line["planned"] != line["rehearsed"]]
        kinds = {tuple(line["what"].split()[1:]) for line in wrong if line["unit"] == "bytes"}
        assert kinds == set(), wrong


def test_memory_is_that_of_the_plan_within_a_tenth(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for line in rank["lines"]:
            if line["what"] in ("memory at rest", "memory, peak of train"):
                assert abs(line["error"]) < 0.1, line


def test_waits_are_counted_by_place(ranks: list[dict[str, Any]]) -> None:
    waits = next(phase for phase in reversed(ranks[-1]["phases"]) if phase["phase"] == "train")["waits"]
    assert any(place.startswith("megatron/core/transformer/moe") for place in waits)


def test_running_out_of_memory_is_found_with_its_phase(tmp_path: Path) -> None:
    model = write_folder(replace(SHAPES["qwen2.5-72b"], num_layers=40), tmp_path / "model")
    ended = rehearse("parallel={tensor: 2, sequence: true}", "--model", str(model), "--world", "2", "--rank", "1")
    assert ended.returncode == 1
    line = ended.stderr.strip().splitlines()[-1]
    assert line.startswith("rank 1 (stage 0) runs out of memory in phase load model:"), ended.stderr
