"""Outside the environment, on a Python without packages, every command says in one line what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from recipes import ROOT

from megatron_hdpo import commands

REMEDY = "run `make quickstart`, then `source .venv/bin/activate`"
RECIPE = "examples/digit_sums/hdpo.yaml"
TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if path.name != "relay.py" and path.name[0] != "_")
QUICKSTART = ("quickstart.py", "fetch_model.py", "answers.py", "sums_figure.py")
SCRIPTS = [ROOT / "examples/compare/compare.py", *(ROOT / "examples/quickstart" / name for name in QUICKSTART)]
PARTS = sorted((ROOT / "examples" / "compare").glob("*_*.py"))
LAUNCHERS = [
    *sorted((ROOT / "examples" / "cluster").glob("[!c]*")),  # not common.sh, which they share
    *sorted((ROOT / "examples").glob("*/launch.sh")),
]


def bare(*command: str, code: int | None = None, **variables: str) -> str:
    """Return what a command prints, run from the root where PATH has the system's programs only.

    A Python among them is the one of these tests without its packages: -S leaves site-packages out.
    """
    arguments = [sys.executable, "-S", *command[1:]] if command[0] == "python" else list(command)
    environment = {"PATH": "/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")} | variables
    done = subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    assert code is None or done.returncode == code, f"exit code {done.returncode}\n{said}"
    return said


def test_doctor_lists_what_is_missing_and_what_to_do() -> None:
    lines = bare("python", "-m", "megatron_hdpo", "doctor", code=1).splitlines()
    assert "BAD  torch is missing" in lines and "BAD  rich is missing" in lines
    assert "-    apex not installed (optional)" in lines
    assert lines[-1].endswith(REMEDY) and sum(REMEDY in line for line in lines) == 1


@pytest.mark.parametrize(
    "arguments", [["--help"], *([command.name, "--help"] for command in commands.ALL)], ids=" ".join
)
def test_help_needs_no_package(arguments: list[str]) -> None:
    assert bare("python", "-m", "megatron_hdpo", *arguments, code=0).startswith("usage: megatron_hdpo")


def test_version_says_what_is_not_installed() -> None:
    lines = bare("python", "-m", "megatron_hdpo", "--version", code=0).splitlines()
    assert lines[0].startswith("megatron_hdpo ") and "torch not installed" in lines


@pytest.mark.parametrize("command", ["train", "evaluate", "check", "plan", "report"])
def test_another_command_names_the_package_in_one_line(command: str) -> None:
    (line,) = bare("python", "-m", "megatron_hdpo", command, RECIPE, code=2).splitlines()
    assert " is not installed for " in line and line.endswith(REMEDY)


@pytest.mark.parametrize("tool", [*TOOLS, *SCRIPTS], ids=lambda path: path.name)
def test_help_of_a_tool_is_help_or_one_line(tool: Path) -> None:
    said = bare("python", str(tool), "--help")
    assert said.startswith("usage: ") or (said.count("\n") == 1 and said.endswith(f"{REMEDY}\n")), said


@pytest.mark.parametrize("part", PARTS, ids=lambda path: path.name)
def test_a_part_of_the_comparison_says_that_it_is_one(part: Path) -> None:
    (line,) = bare("python", str(part), "--help", code=1).splitlines()
    assert line == f"{part.name} is a part of compare.py: run `python examples/compare/compare.py --help`"


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda path: path.name)
def test_help_of_a_launch_script_is_its_usage(script: Path) -> None:
    said = bare("bash", str(script), "--help", code=0)
    assert script.name in said and "SBATCH" not in said and "#" not in said


@pytest.mark.parametrize("name", ["one_node.sh", "several_nodes.sh", "kubernetes.sh", "launch.sh"])
def test_a_launch_script_names_the_missing_torchrun(name: str, tmp_path: Path) -> None:
    (script,) = [path for path in LAUNCHERS if path.name == name]
    recipe = [] if name == "launch.sh" else [RECIPE]
    variables = {"NODES": "2", "HEAD": "127.0.0.1:1"}
    (line,) = bare("bash", str(script), *recipe, f"output={tmp_path}/run", code=1, **variables).splitlines()
    assert line == f"torchrun is not installed: {REMEDY}"
    assert not (tmp_path / "run").exists()


def test_servers_name_the_missing_sglang(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    script = "examples/cluster/servers.sh"
    given = {"MODEL": "m", "URLS": f"{tmp_path}/urls"}
    (line,) = bare("bash", script, code=2, PYTHON=str(python), **given).splitlines()
    assert f"PYTHON={python}: SGLang is not installed there" in line
    (line,) = bare("bash", script, code=2, PYTHON="no-such-python", **given).splitlines()
    assert line == "PYTHON=no-such-python: no such program"


def test_the_folder_that_a_setup_leaves_is_no_installation(tmp_path: Path) -> None:
    """Every Python started in the repository finds megatron_hdpo.egg-info there."""
    (tmp_path / "megatron_hdpo.egg-info").mkdir()
    (tmp_path / "megatron_hdpo.egg-info" / "PKG-INFO").write_text("Name: megatron-hdpo\nVersion: 0.1.0\n")
    said = bare("python", "-m", "megatron_hdpo", "doctor", code=1, PYTHONPATH=str(tmp_path))
    assert said.endswith(f"{REMEDY}\n")
