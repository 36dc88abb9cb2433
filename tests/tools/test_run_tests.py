"""Parts of the test suite: what is run, what counts as a failure, and the one total."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import run_tests
from recipes import ROOT
from run_tests import NEWEST_CORE, PARTS, Part, Result, lines, run, total


def told(passed: int, core: str = "0.16.1", **others: int) -> dict:
    outcomes = {"passed": passed, "failed": 0, "error": 0, "skipped": 0} | others
    return {"outcomes": outcomes, "python": "3.11.7", "megatron_core": core}


def test_the_total_is_that_of_all_parts_and_a_failure_is_named() -> None:
    results = [
        Result(Part("suite"), 0, 100.0, told(30, skipped=2)),
        Result(Part("newest-core", core="0.19.2"), 1, 20.4, told(4, core="0.19.2", failed=1)),
    ]
    assert list(lines(results)) == [
        "",
        "suite (Python 3.11.7, megatron-core 0.16.1): 30 passed, 2 skipped in 100 s",
        "newest-core (Python 3.11.7, megatron-core 0.19.2): 4 passed, 1 failed in 20 s: FAILED (exit code 1)",
        "total: 34 passed, 1 failed, 2 skipped in 120 s",
    ]


def test_a_part_on_another_megatron_core_and_one_that_breaks_off_are_failures() -> None:
    other = Result(Part("newest-core", core="0.19.2"), 0, 1.0, told(4))
    assert other.problem == "ran on megatron-core 0.16.1, not on 0.19.2"
    broken = Result(Part("suite"), 4, 1.0, {})
    assert broken.problem == "no summary, exit code 4" and total([broken])["passed"] == 0
    assert Result(Part("suite"), 0, 1.0, told(4)).problem is None


def pretend(folder: Path, text: str) -> Path:
    """A program in place of Python, with its arguments in $said and the path after --summary in $summary."""
    program = folder / "python"
    find = 'said="$*"; while [ "$1" != --summary ]; do shift; done; summary=$2'
    program.write_text(f"#!/usr/bin/env bash\n{find}\n{text}\n")
    program.chmod(0o755)
    return program


def test_a_part_runs_pytest_with_its_arguments_and_variables(tmp_path: Path) -> None:
    summary = json.dumps(told(1))
    program = pretend(
        tmp_path, f"echo $said > {tmp_path}/said; echo $HOW >> {tmp_path}/said; echo '{summary}' > $summary; exit 3"
    )
    result = run(Part("part", ("-m", "slow"), program, variables={"HOW": "so"}))
    assert (result.code, result.told) == (3, told(1))
    command, variable = (tmp_path / "said").read_text().splitlines()
    assert command.startswith("-m pytest -n 2 ") and command.endswith(" -m slow") and variable == "so"


def test_every_part_of_the_command_line_is_run_and_one_failure_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fine = pretend(tmp_path, f"echo '{json.dumps(told(2))}' > $summary")
    monkeypatch.setitem(PARTS, "suite", lambda: [Part("broken", python=pretend_failing(tmp_path))])
    monkeypatch.setitem(PARTS, "long", lambda: [Part("fine", python=fine)])
    monkeypatch.setattr(sys, "argv", ["run_tests.py", "suite", "long", "--summary", str(tmp_path / "all.json")])
    with pytest.raises(SystemExit) as ended:
        run_tests.main()
    assert ended.value.code == 1
    assert capfd.readouterr().out.splitlines()[-1].startswith("total: 2 passed in ")
    assert json.loads((tmp_path / "all.json").read_text())["parts"] == {"broken": {}, "fine": told(2)}


def pretend_failing(folder: Path) -> Path:
    (folder / "failing").mkdir()
    return pretend(folder / "failing", "exit 2")


def test_the_parts_of_the_newest_core_find_it_before_the_installed_one() -> None:
    (part,) = PARTS["newest-core"]()
    assert part.core == NEWEST_CORE and part.variables["PYTHONPATH"].startswith(str(run_tests.NEWEST_FOLDER))
    tests = [word for word in part.arguments if word.startswith("tests/")]
    assert {"model", "weights", "checkpoint"} <= {Path(name).parts[1] for name in tests}
    assert all((ROOT / name).is_file() for name in tests)


def test_make_downloads_the_newest_core_that_the_tests_run_on() -> None:
    said = subprocess.run(["make", "-n", "-B", "newest-core"], cwd=ROOT, capture_output=True, text=True).stdout
    assert f"megatron-core=={NEWEST_CORE}" in said and str(run_tests.NEWEST_FOLDER.relative_to(ROOT)) in said
