"""The trials of tools/check_gpu.py run on a CPU as far as one can, and tell settings that differ from those that must
not."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import _gpu_kernels
import bench_rollout
import check_gpu
import gpu_trials
import pytest
import torch
from _python_parts import PartError, run_python
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
    return {name: dict(gpu_trials.TRIALS[name](gpu_trials.Work(model, **SIZES), "cpu")) for name in names}


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
        return dict(gpu_trials._compare(settings, step, gpu_trials._weights))["0.02"]["largest_difference"]


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


def test_kernels(found: dict) -> None:
    compared = found["kernels"]
    assert "on a GPU" in compared.pop("digest")["refused"]
    assert len(compared) == 10 and all(value["largest_difference"] < 0.02 for value in compared.values())


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _gpu_kernels.attend

    def shifted(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        out = right(query, *rest)
        return out if query.dtype == torch.float64 else out.roll(1, 0)

    monkeypatch.setattr(_gpu_kernels, "attend", shifted)
    with pytest.raises(ValueError, match=r"differ by .* from float64's, 0\.0001 is the limit"):
        _gpu_kernels.attention("cpu", torch.float32, 64, 2, 1)


def test_every_trial_is_a_check() -> None:
    assert {
        "kernels",
        "fp8",
        "recompute",
        "offload",
        "checkpoint",
        "overlap",
        "planned",
        "embedded",
    } < check_gpu.CHECKS.keys()


def test_a_recipe_that_fails_loses_no_other(tiny_model: Path) -> None:
    found = run_ranks(1, one_recipe_fails, "blockwise", tiny_model)[0]
    assert found["blockwise"] == {"error": "RuntimeError: needs CUDA 12.9"}
    assert found["tensorwise"]["largest_difference"] == 0.5
    without = run_ranks(1, one_recipe_fails, "bfloat16", tiny_model)[0]
    assert without["bfloat16"] == {"error": "RuntimeError: needs CUDA 12.9"}
    assert without["mxfp8"]["losses"] == [1.5, 3.0] and without["mxfp8"]["largest_difference"] is None


def one_recipe_fails(recipe: str, model: Path) -> dict[str, Any]:
    def curve(work: Any, context: Any, settings: dict[str, Any]) -> dict[str, Any]:
        if settings.get("fp8_recipe", "bfloat16") == recipe:
            raise RuntimeError("needs CUDA 12.9")
        return {"losses": [1.5, 3.0] if settings else [1.0, 2.0]}

    with patch.object(gpu_trials, "_fp8_curve", curve):
        return dict(gpu_trials.fp8(gpu_trials.Work(model, **SIZES), "cpu"))


def test_a_dtype_that_fails_hides_no_other(tiny_model: Path) -> None:
    """On a CPU the specs cannot be compared, and each dtype says so."""
    found = run_ranks(1, compare_specs, tiny_model)[0]
    assert found.keys() == {"float32", "bfloat16"}
    assert all("transformer_engine needs a GPU" in result["error"] for result in found.values()), found


def compare_specs(model: Path) -> dict[str, Any]:
    return dict(gpu_trials.specs(gpu_trials.Work(model, **SIZES | {"micro_batch_tokens": 128}), "cpu"))


def test_without_a_reference_there_is_no_difference(tiny_model: Path) -> None:
    """The setting after one that failed is not taken for the reference."""
    assert run_ranks(1, compare_after_a_failure, tiny_model)[0] is None


def compare_after_a_failure(model: Path) -> float | None:
    def broken() -> Any:
        raise RuntimeError("on purpose")

    with gpu_trials.joined("cpu") as context:
        work = gpu_trials.Work(model, **SIZES)
        settings = {"broken": broken, "fine": lambda: gpu_trials.build(work, context)}
        step = lambda policy: policy.accumulate_gradients(work.examples(), gpu_trials.SPEC)  # noqa: E731
        return dict(gpu_trials._compare(settings, step, gpu_trials._weights))["fine"]["largest_difference"]


def check(monkeypatch: pytest.MonkeyPatch, out: Path, checks: dict[str, Any], *more: str) -> int:
    """Run check_gpu on a CPU with these checks; return its exit code."""
    monkeypatch.setattr(check_gpu, "CHECKS", checks)
    monkeypatch.setattr("sys.argv", ["check_gpu.py", "--out", str(out), "--device", "cpu", *more])
    with pytest.raises(SystemExit) as exit:
        check_gpu.main()
    assert isinstance(exit.value.code, int)
    return exit.value.code


def test_the_file_is_whole_while_a_check_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was known when a check is killed, or fails, stays."""
    out, seen = tmp_path / "gpu.json", []

    def slow(run: check_gpu.Run) -> dict[str, Any]:
        run.note({"first": {"seconds": 1.0}})
        seen.append(json.loads(out.read_text()))
        raise check_gpu.PartError("did not end within 300 s")

    assert check(monkeypatch, out, {"fine": lambda run: {"number": 1}, "slow": slow}) == 1
    assert seen[0]["fine"]["ok"] and seen[0]["slow"]["first"] == {"seconds": 1.0}
    assert not seen[0]["slow"]["ok"] and "still running" in seen[0]["slow"]["error"]
    after = json.loads(out.read_text())["slow"]
    assert after["first"] == {"seconds": 1.0} and after["error"] == "did not end within 300 s" and not after["ok"]


def test_settings_of_a_trial_are_noted_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that packages print are none; one setting that failed fails the check, and the rest is kept."""
    lines = ["a warning", '{"bfloat16": {"losses": [1.0]}}', '{"blockwise": {"error": "no CUDA 12.9"}}', "3"]

    def run_python(arguments: list[str], root: Path, seconds: float, on_line: Any) -> None:
        for line in lines:
            on_line(line + "\n")

    monkeypatch.setattr(check_gpu, "run_python", run_python)
    trial = partial(check_gpu.trial, "fp8")
    assert check(monkeypatch, tmp_path / "gpu.json", {"fp8": trial}, "--model", str(tmp_path)) == 1
    fp8 = json.loads((tmp_path / "gpu.json").read_text())["fp8"]
    assert not fp8["ok"] and fp8["bfloat16"] == {"losses": [1.0]} and fp8["blockwise"] == {"error": "no CUDA 12.9"}
    assert fp8.keys() == {"ok", "error", "seconds", "bfloat16", "blockwise"} and fp8["error"] == "in blockwise"


def test_no_check_begins_past_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    assert check(monkeypatch, out, dict(check_gpu.CHECKS), "--seconds", "0", "--only", "divergence", "run") == 1
    found = json.loads(out.read_text())
    assert found["divergence"]["error"] == "no time was left for it"
    assert found["run"]["error"] == "no time was left for it"


def test_a_part_that_fails_and_one_that_hangs(tmp_path: Path) -> None:
    lines: list[str] = []
    code = "import sys; print('one'); print('two', flush=True); sys.exit('the reason')"
    with pytest.raises(PartError, match=r"ended with 1:\none\ntwo\nthe reason"):
        run_python(["-c", code], tmp_path, 100.0, lines.append)
    assert lines == ["one\n", "two\n"]
    with pytest.raises(PartError, match="did not end within 0 s"):
        run_python(["-c", "import time; time.sleep(1000)"], tmp_path, 0.0, lines.append)


def test_served_models_have_heads_that_gpu_kernels_support() -> None:
    for name, sizes in bench_rollout.SIZES.items():
        assert sizes["hidden"] == 64 * sizes["heads"], name


def test_a_trial_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> dict:
        raise RuntimeError("on purpose")

    out = tmp_path / "gpu.json"
    assert check(monkeypatch, out, {"broken": broken, "fine": lambda *_: {"number": 1}}) == 1
    results = json.loads(out.read_text())
    assert "on purpose" in results["broken"]["error"] and results["fine"]["number"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["check_gpu.py", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit, match="no GPU here"):
        check_gpu.main()
    assert not (tmp_path / "gpu.json").exists()
