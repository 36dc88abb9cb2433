"""The table of faults is the one that the tests make."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fault_table
import pytest

ROOT = Path(__file__).parents[2]


def test_the_page_is_that_of_the_tests() -> None:
    """In an interpreter of its own: Python 3.11 may fail to parse while threads of other tests are alive."""
    command = [sys.executable, str(ROOT / "tools" / "fault_table.py"), "--check"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_the_page_has_one_row_for_each_mark() -> None:
    rows = [line for line in fault_table.PAGE.read_text(encoding="utf-8").splitlines() if "](../tests/" in line]
    others = [path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py") if path != Path(__file__)]
    marks = sum(text.count("@pytest.mark.fault(") for text in others)
    assert len(set(rows)) == len(rows) == marks >= 60


@pytest.mark.parametrize("words", ["phase='start'", "phase='start', seen='', lost='', sen=''"])
def test_a_mark_with_other_words_is_an_error(words: str, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(f"@pytest.mark.fault('it breaks', {words})\ndef test_it(): ...\n")
    with pytest.raises(TypeError):
        list(fault_table.faults(tmp_path))
