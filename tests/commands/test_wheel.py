"""The wheel holds the recipes: `init` works where there is no repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from recipes import ROOT

from megatron_hdpo.commands.init import shipped

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel of this repository, built in a copy of it."""
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("megatron_hdpo", "examples"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [sys.executable, "-c", BUILD, str(folder)]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_an_installed_package_lists_and_copies_every_recipe(installed: Path, tmp_path: Path) -> None:
    def said(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(installed), "COLUMNS": "100"}
        command = [sys.executable, "-m", "megatron_hdpo", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert [line.split()[0] for line in said("init").splitlines()] == list(shipped())
    said("init", "qwen2.5-7b", "mine")
    assert {path.name for path in (tmp_path / "mine" / "cluster").iterdir()} >= {"slurm.sbatch", "common.sh"}
    assert (tmp_path / "mine" / "qwen2.5-7b-hdpo.yaml").is_file()
