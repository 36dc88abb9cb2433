"""The trials of tools/check_gpu.py run on a CPU as far as one can, and tell settings that differ from those that must
not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import check_gpu
import gpu_trials
import pytest
import torch
from distributed_helper import run_ranks

SIZES: dict[str, Any] = {
    "prompt": 6,
    "response": 8,
    "micro_batch_tokens": 28,
    "steps": 4,
    "dtype": "float32",
    "lr": 1e-2,
}


def run_trials(names: list[str], model: Path) -> dict[str, dict[str, Any]]:
    return {name: gpu_trials.TRIALS[name](gpu_trials.Work(model, **SIZES), "cpu") for name in names}


@pytest.fixture(scope="module")
def found(tiny_model: Path) -> dict[str, dict[str, Any]]:
    alone = [name for name in gpu_trials.TRIALS if name not in ("overlap", "specs")]
    return run_ranks(1, run_trials, alone, tiny_model)[0]


@pytest.fixture(scope="module")
def overlapped(tiny_model: Path) -> list[dict[str, Any]]:
    return [rank["overlap"] for rank in run_ranks(2, run_trials, ["overlap"], tiny_model)]


def test_no_setting_ended_in_an_error(found: dict, overlapped: list) -> None:
    for results in (*found.values(), *overlapped):
        assert not [value for value in results.values() if isinstance(value, dict) and value.get("error")]


def test_fp8(found: dict) -> None:
    plain = found["fp8"]["bfloat16"]
    assert len(plain["losses"]) == SIZES["steps"] and plain["losses"][-1] < plain["losses"][0]
    assert plain["largest_difference"] == 0.0 and plain["step_s"] > 0
    for recipe in gpu_trials.FP8_RECIPES:
        assert "needs Transformer Engine on a GPU" in found["fp8"][recipe]["refused"]


def test_recompute(found: dict) -> None:
    assert {name: mode["largest_difference"] for name, mode in found["recompute"].items()} == dict.fromkeys(
        gpu_trials.RECOMPUTE, 0.0
    )


def test_offload_needs_a_gpu(found: dict) -> None:
    assert "host memory already" in found["offload"]["refused"]


def test_checkpoint(found: dict) -> None:
    for kind in ("tied", "reshardable"):
        assert found["checkpoint"][kind]["largest_difference"] == 0.0
        assert "host memory already" in found["checkpoint"][f"{kind}, half offloaded"]["refused"]


def test_overlap(overlapped: list) -> None:
    for rank in overlapped:
        assert rank["replicas"] == 2
        assert rank["on"]["largest_difference"] < 1e-6


def test_a_difference_is_seen(tiny_model: Path) -> None:
    """Two rates of learning in the place of two settings that must agree."""
    assert run_ranks(1, compare_two_rates, tiny_model)[0] > 1e-3


def compare_two_rates(model: Path) -> float:
    with gpu_trials.joined("cpu") as context:
        works = {str(lr): gpu_trials.Work(model, **SIZES | {"lr": lr}) for lr in (1e-2, 2e-2)}
        settings = {name: lambda work=work: gpu_trials.build(work, context) for name, work in works.items()}
        examples = works["0.01"].examples()
        step = lambda policy: policy.update(examples, gpu_trials.SPEC)  # noqa: E731
        return gpu_trials._compare(settings, step, gpu_trials._weights)["0.02"]["largest_difference"]


def test_planned_memory(found: dict) -> None:
    for mode in ("none", "full"):
        assert found["planned_memory"][mode]["measured_gib"] is None
        kinds = found["planned_memory"][mode]["kinds_gib"]
        assert {"weights", "gradients", "activations"} < kinds.keys() and "framework" not in kinds
    planned = {mode: found["planned_memory"][mode]["planned_gib"] for mode in ("none", "full")}
    assert planned["full"] < planned["none"]


def test_embedded(found: dict) -> None:
    engine = found["embedded"]
    assert engine["tokens"] > 0 and engine["tokens_per_s"] > 0
    assert engine["max_logprob_difference"] < 1e-3


def test_every_trial_is_a_check() -> None:
    assert {"fp8", "recompute", "offload", "checkpoint", "overlap", "planned", "embedded"} < check_gpu.CHECKS.keys()


def test_a_trial_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> dict:
        raise RuntimeError("on purpose")

    checks = {"broken": broken, "fine": lambda *_: {"number": 1}}
    monkeypatch.setattr(check_gpu, "CHECKS", checks)
    out = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["check_gpu.py", "--out", str(out), "--device", "cpu"])
    with pytest.raises(SystemExit) as exit:
        check_gpu.main()
    assert exit.value.code == 1
    results = json.loads(out.read_text())
    assert "on purpose" in results["broken"]["error"] and results["fine"]["number"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["check_gpu.py", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit, match="no GPU here"):
        check_gpu.main()
    assert not (tmp_path / "gpu.json").exists()
