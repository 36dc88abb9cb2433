"""The Triton kernels in Triton's interpreter, which must be on before they are imported: in another process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton)"
)


def run_alone(script: str, **more: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(HELPERS), str(ROOT)]), **more}
    run = subprocess.run([sys.executable, str(HELPERS / script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@needs_triton
def test_kernels_agree_with_the_definitions_in_the_interpreter() -> None:
    assert "cases" in run_alone("triton_in_interpreter.py", TRITON_INTERPRET="1")


@needs_triton
def test_kernels_compile_for_hopper_within_their_budget_of_instructions() -> None:
    """Registers, loads and instructions per logit, read from the machine code.

    An H200 delivers about 10 bfloat16 logits per cycle and SM, which issues 128 lanes' instructions in that time.
    """
    assert "gradient_kernel" in run_alone("triton_ahead.py")
