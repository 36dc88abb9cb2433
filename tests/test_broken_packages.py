"""Beside a Transformer Engine that cannot be imported, every command says so in one line; only `doctor` goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hdpo.environment import broken_package
from megatron_hdpo.model.config import ModelConfig, ModelError, choose_spec

ROOT = Path(__file__).resolve().parents[1]
Tree = dict[str, Any]


def broken_engine(folder: Path, code: str) -> Path:
    package = folder / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text(code)
    return folder


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_no_command_ends_in_a_traceback(tree: Tree, write_recipe: Callable[[Tree], Path], tmp_path: Path) -> None:
    folder = broken_engine(tmp_path, "raise FileNotFoundError('no libtransformer_engine.so\\nin any of these: ...')")
    recipe, command = str(write_recipe(tree)), ("-m", "megatron_hdpo")
    begun = {
        "doctor": start(folder, *command, "doctor"),
        "check": start(folder, *command, "check", recipe),
        "a tool": start(folder, "tools/gpu_trials.py", "fp8", "--model", "nowhere"),
    }
    ended = {name: (*process.communicate(timeout=120), process.returncode) for name, process in begun.items()}
    line = "Transformer Engine is installed but does not load (FileNotFoundError: no libtransformer_engine.so); "
    for name, (stdout, stderr, code) in ended.items():
        assert "Traceback" not in stderr, name
        if name == "doctor":
            assert f"BAD  {line}" in stdout and "-    Apex: not installed" in stdout and code == 1
        else:
            assert stderr.startswith(line) and stderr.count("\n") == 1, (name, stderr)
            assert code == (1 if name == "a tool" else 2), name


def test_only_errors_of_its_import_are_the_engines() -> None:
    """An error of a kernel that runs is none of them."""
    engine: dict[str, Any] = {"__name__": "transformer_engine.pytorch.module"}
    exec("def run():\n    raise RuntimeError('cuBLAS')", engine)
    with pytest.raises(RuntimeError) as caught:
        engine["run"]()
    assert broken_package(caught.value) is None
    assert broken_package(ValueError("something else")) is None


def test_a_gpu_run_does_not_take_an_engine_that_fails_to_import(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Megatron takes an ImportError for the engine's absence, and would then miss its modules."""
    monkeypatch.syspath_prepend(str(broken_engine(tmp_path, "raise ImportError('libcudnn.so.9')")))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for spec in ("auto", "transformer_engine"):
        with pytest.raises(
            ModelError, match=r"does not load \(ImportError: libcudnn\.so\.9\).* or set model.spec=torch"
        ):
            choose_spec(ModelConfig(path="", spec=spec), gpu)
    assert choose_spec(ModelConfig(path="", spec="torch"), gpu) == "torch"
    assert choose_spec(ModelConfig(path=""), cpu) == "torch"
