"""What Linux alone has is not needed for a run with the embedded engine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from recipes import ROOT
from resolve_platforms import Resolved, read_lock

from megatron_hdpo.parallel.cores import usable_cores
from megatron_hdpo.rewards import worker
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig

WITHOUT = """
import importlib.abc, os, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton" or name == "megatron.core.datasets.helpers_cpp":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
if hasattr(os, "sched_getaffinity"):
    del os.sched_getaffinity
import megatron_hdpo.training.run, megatron_hdpo.training.loop, megatron_hdpo.tracking.report
megatron_hdpo.training.run.set_threads(type("R", (), {"threads_per_rank": None}), 1)
print("imported")
"""


def test_training_imports_without_triton_affinity_or_megatrons_compiled_helper() -> None:
    """The compiled helper is for Megatron's own data sets; a package built without a compiler lacks it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "imported\n", done.stderr


def test_cores_without_affinity_are_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert usable_cores() == [0, 1, 2]


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {5, 1}, raising=False)
    assert usable_cores() == [1, 5]


def test_a_reward_worker_without_proc_says_that_it_has_no_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def absent(self: Path, *_: Any) -> str:
        raise FileNotFoundError(2, "No such file or directory", str(self))

    limits = SimpleNamespace(getpagesize=lambda: 4096, setrlimit=lambda *_: pytest.fail("a limit from no number"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setitem(sys.modules, "resource", limits)
    monkeypatch.setattr(Path, "read_text", absent)
    with caplog.at_level(logging.WARNING):
        worker._limit_memory(64)
    assert "has no memory limit" in caplog.text and "/proc/self/statm" in caplog.text


def test_servers_of_the_trainer_are_refused_elsewhere_than_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match=r"on Linux only, and this is darwin; take rollout.engine=embedded"):
        ServerConfig().check_interpreter("cpu")
    ServerConfig().check("cuda")  # a recipe for a cluster can be checked on a Mac


def test_the_table_of_platforms_tells_wheels_from_sources() -> None:
    lock = {
        "packages": [
            {"name": "torch", "wheels": [{"size": 100_000_000}, {"size": 200_000_000}]},
            {"name": "megatron-core", "sdist": {"size": 1}},
        ]
    }
    assert read_lock(lock) == Resolved(2, ("megatron-core",), 0.2)
    assert read_lock(lock).cell() == "2 packages, 0.2 GB; from source: megatron-core"
    assert Resolved(failure="torch has no wheel").cell() == "no: torch has no wheel"
