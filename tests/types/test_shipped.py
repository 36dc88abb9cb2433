"""Pickles that bring their code: another process runs what this one has read, or refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hdpo.types.plugins import load_reference
from megatron_hdpo.types.shipped import dumps, loads

ROOT = Path(__file__).parents[2]
CODE = "class Mine:\n    def value(self):\n        return 3\n\n\ndef scored():\n    return 4\n"
READER = """\
import sys, pathlib
sys.path[:] = {paths!r}
from megatron_hdpo.types.shipped import loads
try:
    mine, nested = loads(pathlib.Path({file!r}).read_bytes())
    print(mine.value(), nested["scored"](), "torch" in sys.modules)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "shipped_lab", raising=False)
    (tmp_path / "shipped_lab.py").write_text(CODE)
    return tmp_path


def read_elsewhere(folder: Path, data: bytes) -> str:
    """What another process says that reads the pickle."""
    (folder / "data").write_bytes(data)
    code = READER.format(paths=[str(folder), str(ROOT), *sys.path[1:]], file=str(folder / "data"))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def pickled(where: str) -> bytes:
    mine, scored = (load_reference(f"{where}:{name}", "group").value for name in ("Mine", "scored"))
    return dumps([mine(), {"scored": scored}])


@pytest.mark.parametrize("where", ["shipped_lab.py", "shipped_lab"])
def test_another_process_runs_the_same_code(where: str, folder: Path) -> None:
    assert read_elsewhere(folder, pickled(where)) == "3 4 False"


def test_a_file_that_has_changed_since_is_run_as_it_was(folder: Path) -> None:
    data = pickled("shipped_lab.py")
    (folder / "shipped_lab.py").unlink()
    assert read_elsewhere(folder, data) == "3 4 False"


def test_a_module_that_has_changed_since_is_refused(folder: Path) -> None:
    data = pickled("shipped_lab")
    (folder / "shipped_lab.py").write_text(CODE.replace("3", "5"))
    assert read_elsewhere(folder, data) == (
        f"PluginError {folder}/shipped_lab.py has changed since the run began: start the run again"
    )


def test_plain_values_pass() -> None:
    value = [1, "two", {"three": (3.0, None)}, Path("four")]
    assert loads(dumps(value)) == value
