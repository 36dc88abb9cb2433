"""Commands that open a run: the first line comes before the imports that take seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
AT_THE_FIRST_IMPORT_OF_TORCH = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.stdout.flush()
            os.write(1, b"torch\\n")
            os._exit(0)

sys.meta_path.insert(0, Watch())
from megatron_hdpo.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("command", ["train", "evaluate", "sample"])
def test_what_is_loaded_is_said_before_it_is_imported(command: str) -> None:
    arguments = [command, "examples/digit_sums/hdpo.yaml"]
    code = [sys.executable, "-c", AT_THE_FIRST_IMPORT_OF_TORCH]
    ended = subprocess.run([*code, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == ["loading PyTorch and Megatron-Core ...", "torch"]
