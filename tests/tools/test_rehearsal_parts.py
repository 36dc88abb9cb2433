"""The parts of tools/rehearse.py that need no CUDA build of torch."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from _rehearsal import build
from _rehearsal.folder import UnwrittenWeights, write_folder
from _rehearsal.host_values import even_parts
from _rehearsal.planned import Line, layers_note, lines
from _rehearsal.record import compared, record_of, setting_of_record
from _rehearsal.replaced import Rehearsed, replaced
from _rehearsal.report import comparison, failure_line, largest_errors, rank_text
from _rehearsal.servers import stand_ins
from _rehearsal.setting import Asked, Setting, sampled_ranks, setting_of, shortened
from _rehearsal.synthetic import groups_of
from _rehearsal.world import OneRankStore
from bench_rehearsal import CASES, asked_of, page
from recipes import ROOT

from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.model.architecture import read_architecture
from megatron_hdpo.planner.made_up import PromptsOfLength, random_score
from megatron_hdpo.planner.shapes import SHAPES
from megatron_hdpo.training.run import _build_objective
from megatron_hdpo.weights.mapping import tensors

GIB = 2**30
RECIPE = ROOT / "examples" / "qwen2.5-7b" / "hdpo.yaml"


ASKED = Asked(str(RECIPE), (), "h100", 16, "qwen2.5-7b")


def setting(*overrides: str, **fields: Any) -> Setting:
    return setting_of(dataclasses.replace(ASKED, overrides=overrides, **fields))


def test_a_sample_has_a_rank_of_each_stage_and_owner_of_experts() -> None:
    assert sampled_ranks(Layout(tensor=2, data=8)) == [0]
    assert sampled_ranks(Layout(tensor=8, pipeline=8, data=16)) == [0, 128, 896]
    assert sampled_ranks(Layout(tensor=4, pipeline=2, data=8, expert=16)) == [0, 15, 32, 47]


@pytest.mark.parametrize(("total", "parts"), [(128, 4), (10, 4), (3, 8), (0, 2)])
def test_an_even_split_is_whole_and_even(total: int, parts: int) -> None:
    split = even_parts(total, parts)
    assert split.sum() == total and len(split) == parts and split.max() - split.min() <= 1


def test_the_price_of_plain_torch_layers_is_said() -> None:
    note = layers_note(setting(), "torch")
    plain, engine = (float(number) for number in re.findall(r"([\d.]+) (?:GiB|with T)", note))
    assert plain > engine + 5 and "not installed here" in note
    assert layers_note(setting("model.spec=torch"), "torch") == ""


def test_a_shorter_step_gives_every_replica_its_micro_batches() -> None:
    whole = setting()
    short = shortened(whole.workload, whole.layout, 2)
    assert short.prompts < whole.workload.prompts
    assert short.training_work(whole.layout).count >= 2
    assert shortened(whole.workload, whole.layout, 10**6).prompts == whole.workload.prompts


def test_groups_have_the_shares_of_the_plan() -> None:
    """As many sequences to train and to score as the planner counts with."""
    found = setting(micro_batches=2)
    work = found.workload
    objective = _build_objective(found.recipe, SimpleNamespace(prompts=PromptsOfLength(work.privileged_prompt_tokens)))  # type: ignore[arg-type]
    groups = groups_of(work, objective, vocab_size=1000)
    objective.begin_step(0, groups)
    scorings = objective.scorings(groups)
    top_k_of: dict[object, int] = {scoring.key: scoring.top_k for scoring in scorings}
    scores = {scoring.key: random_score(scoring, top_k_of, np.random.default_rng(0)) for scoring in scorings}
    examples = objective.examples(groups, scores, objective.totals(groups, scores))
    assert len(scorings) == work.scored("teacher")[0] == work.kept
    assert sum(not example.inert for example in examples) == work.trained_sequences
    assert {example.num_tokens for example in examples} == {work.sequence_tokens}


@pytest.mark.parametrize("name", SHAPES)
def test_a_folder_without_weights_is_the_model(name: str, tmp_path: Path) -> None:
    architecture = dataclasses.replace(SHAPES[name], num_layers=2)
    folder = write_folder(architecture, tmp_path)
    assert read_architecture(folder) == architecture
    with UnwrittenWeights(folder) as weights:
        assert weights.mismatches(tensors(architecture)) == []
        first = next(iter(tensors(architecture)))
        assert weights.read(first.name, 0, 3, 7).shape == (4, *first.shape[1:])


def test_a_store_names_the_group_of_a_communicator() -> None:
    store = OneRankStore()
    assert len(store.get("0//7//cuda//0")) == 128
    store.set("0//9//cuda//0", b"id 1" + bytes(124))
    assert store.group_of == {"group 0//7//cuda//0": "7", "id 1": "9"}
    assert store.add("counter", 2) == 2 and store.add("counter", 1) == 3


def told(found: Setting, **changes: Any) -> dict[str, Any]:
    """What a rank would tell if everything were as planned."""
    work = found.workload.training_work(found.layout)
    shapes = [dataclasses.asdict(work.shape)] * work.count
    train = {"phase": "train", "allocated": 30 * GIB, "peak": 60 * GIB, "reserved": 61 * GIB, "reserved_peak": 62 * GIB}
    train |= {"free": GIB, "pinned": 0, "rss": GIB, "launches": 900, "flops": 1e15, "device_waits": 3}
    train |= {"waits": {"megatron_hdpo/x.py:1": 3}, "collectives": [["all_reduce", "intra_dist_opt", 1, 4]]}
    rank = {"rank": 0, "stage": 0, "spec": "torch", "total": 80 * GIB, "phases": [train], "updates": [shapes]}
    return rank | {"scored": [], "head_chunk": 1024, "saved": GIB, "pinned": 0, "rss": GIB, "failure": None} | changes


def test_the_report_has_the_plan_beside_what_was_measured() -> None:
    found = setting()
    rank = told(found)
    made = lines(found, rank)
    norm = [line for line in made if line.what == "train: all_reduce intra_dist_opt"]
    assert [(line.planned, line.rehearsed, line.error) for line in norm] == [(1, 1, 0), (4, 4, 0)]
    rest = next(line for line in made if line.what == "memory at rest")
    assert rest.rehearsed == 30 * GIB and rest.error is not None and -0.2 < rest.error < 0
    text = rank_text(rank, made)
    assert "megatron_hdpo/x.py:1" in text and "memory at rest" in text and "exact" in text
    assert "1 of" in "".join(largest_errors(made))


def test_what_the_plan_did_not_expect_is_no_number() -> None:
    assert Line("x", "bytes", 5.0, 0.0).error is None
    assert comparison([Line("x", "bytes", 5.0, 0.0)]).rstrip().endswith("-")


def test_running_out_of_memory_is_one_line() -> None:
    failure = {"phase": "sync", "text": "no room", "allocated": 2 * GIB, "reserved": 3 * GIB, "free": GIB}
    line = failure_line(told(setting(), failure=failure))
    assert "phase sync" in line and "reserved 3.00" in line and "\n" not in line


def test_a_record_keeps_what_the_comparison_needs() -> None:
    asked = dataclasses.replace(ASKED, recipe="examples/qwen2.5-7b/hdpo.yaml")
    rank = told(setting())
    record = json.loads(json.dumps(record_of(asked, rank)))
    assert len(record["rank"]["updates"][0]) == 1, "equal micro-batches are kept once"
    assert compared(record) == lines(setting(), rank)


def test_the_page_has_a_row_per_rank() -> None:
    asked = dataclasses.replace(ASKED, recipe="examples/qwen2.5-7b/hdpo.yaml")
    train = told(setting())["phases"][0]
    fine = record_of(asked, told(setting(), phases=[train, train | {"phase": "sync"}]))
    failure = {"phase": "sync", "text": "no room", "allocated": 2 * GIB, "reserved": 3 * GIB, "free": GIB}
    full = record_of(asked, told(setting(), failure=failure, rank=2))
    text = page({"qwen2.5-7b, 16 h100, rank 0": fine, "qwen2.5-7b, 16 h100, rank 2": full})
    rows = [row for row in text.splitlines() if row.startswith("| qwen2.5-7b |")]
    assert rows[0].startswith("| qwen2.5-7b | TP 2 x PP 1 x DP 8 SP | h100 | 0 of 16 | 30.00 | 60.00 | 62.00 |")
    assert "| 2 of 16 | runs out of memory in sync: no room" in rows[1]
    assert rows[0].count("|") == rows[1].count("|")


@pytest.mark.parametrize("name", CASES)
def test_the_cases_can_be_planned_as_the_page_has_them(name: str) -> None:
    for asked in asked_of(CASES[name], "both", 2):
        assert setting_of_record({"asked": dataclasses.asdict(asked)}).layout.world == asked.world


def test_the_program_of_a_rank_finds_what_it_replaces() -> None:
    """Every name that a rehearsal replaces is there: patching one that is gone would fail on the null GPU only."""
    done = Rehearsed(None, None, 0)  # type: ignore[arg-type]
    with replaced(done), stand_ins(None) as fleets:
        assert fleets == [] and done.saved == 0


def _headers() -> Path | None:
    try:
        return build.headers(build.torch_folder())
    except build.RehearsalError:
        return None


@pytest.mark.skipif(shutil.which("g++") is None or _headers() is None, reason="no g++ or no headers of CUDA")
def test_the_device_library_compiles_without_a_warning(tmp_path: Path) -> None:
    for source in sorted(build.SOURCES.glob("*.cpp")):
        command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", f"-I{_headers()}", source]
        assert subprocess.run(command, capture_output=True, text=True, check=False).stderr == ""
