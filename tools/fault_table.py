"""Write docs/faults.md, the table of faults, from the tests that make them.

    python tools/fault_table.py

A test of a fault is marked with `@pytest.mark.fault(fault, phase=..., seen=..., lost=...)`. The marks are read from the
source files, without importing them.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "faults.md"
GROUPS = {
    "tests/rollout/sglang/": "SGLang servers, and what comes from them",
    "tests/sampling/ tests/rewards/ tests/rollout/": "Rollouts and checks",
    "tests/": "The run, its ranks and its checkpoints",
}
INTRODUCTION = """\
# Faults

What happens when something breaks. Each row is a test that breaks it; all of them are part of `make test`, but the soak
(`test_soak`), which is part of `make test-long`. "Nothing" as what is lost means that the numbers of the run are those
of a run without the fault, or that the samples that come instead are drawn from the same distribution. A sample or a
check that failed is never a reward of 0. Tests of whole runs (`test_run`, `test_wrong_servers`, `test_stalls`) hold
messages and exit codes; those of a part hold what the part says and does, and the exit code is that of every error
which a user can mend.

The page is made from the tests, in a shell in which `source .venv/bin/activate` was run, by

    python tools/fault_table.py
"""


@dataclass(frozen=True)
class Fault:
    """A fault that a test makes. path: of the test's file, from the root of the repository."""

    path: str
    test: str
    fault: str
    phase: str
    seen: str
    lost: str

    @property
    def row(self) -> str:
        """Return the row of the table."""
        return f"| {self.fault} | {self.phase} | {self.seen} | {self.lost} | [{Path(self.path).stem}](../{self.path}) |"


def faults(root: Path) -> Iterator[Fault]:
    """Yield the faults of all tests below `root`/tests, by path and place in the file."""
    for path in sorted(root.glob("tests/**/test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "mark.fault(" in text:
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    yield from _of_test(path.relative_to(root).as_posix(), node)


def _of_test(path: str, test: ast.FunctionDef) -> Iterator[Fault]:
    for mark in test.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
            (fault,) = map(ast.literal_eval, mark.args)
            yield Fault(
                path, test.name, fault, **{word.arg: ast.literal_eval(word.value) for word in mark.keywords if word.arg}
            )


def page(root: Path) -> str:
    """Return the text of docs/faults.md."""
    left, parts = list(faults(root)), [INTRODUCTION]
    for places, title in GROUPS.items():
        rows = [fault for fault in left if fault.path.startswith(tuple(places.split()))]
        left = [fault for fault in left if fault not in rows]
        head = ["| fault | while | what you see | what is lost | test |", "|---|---|---|---|---|"]
        parts.insert(1, "\n".join([f"## {title}", "", *head, *(fault.row for fault in rows), ""]))
    return "\n".join(parts)


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is not that of the tests")
    options, text = parser.parse_args(), page(ROOT)
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE.name} is not that of the tests: run python tools/fault_table.py")


if __name__ == "__main__":
    main()
