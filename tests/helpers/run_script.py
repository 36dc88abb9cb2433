"""Run a script of this folder in a process of its own, with or without Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parent

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton)"
)


def run_script(script: str, **variables: str) -> str:
    """What the script prints; it must end with 0. Triton's interpreter is on only where `variables` turn it on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(HELPERS), str(HELPERS.parents[1])]), **variables}
    run = subprocess.run([sys.executable, HELPERS / script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
