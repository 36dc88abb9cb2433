"""The table of faults is the one that the tests make."""

from __future__ import annotations

from pathlib import Path

import fault_table
import pytest

ROOT = Path(__file__).parents[2]


def test_the_page_is_that_of_the_tests() -> None:
    assert fault_table.PAGE.read_text(encoding="utf-8") == fault_table.page(ROOT), "run tools/fault_table.py"


def test_every_marked_test_has_one_row_in_one_part_of_the_page() -> None:
    rows = [line for line in fault_table.page(ROOT).splitlines() if line.startswith("| ") and "/test_" in line]
    found = list(fault_table.faults(ROOT))
    assert sorted(rows) == sorted(fault.row for fault in found)
    assert len({fault.test for fault in found}) == len(found) >= 60


@pytest.mark.parametrize("words", ["phase='start'", "phase='start', seen='', lost='', sen=''"])
def test_a_mark_with_other_words_is_an_error(words: str, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(f"@pytest.mark.fault('it breaks', {words})\ndef test_it(): ...\n")
    with pytest.raises(TypeError):
        list(fault_table.faults(tmp_path))
