"""Run parts of the tests one after the other and print one total: what `make test` and `make test-long` call.

    python tools/run_tests.py suite newest-core

Parts:
  suite          all tests but the long ones
  newest-core    minutes of the tests of model, weights and checkpoints on the newest Megatron-Core
  long           the tests that need many minutes each
  newest-whole   all tests of those folders on the newest Megatron-Core
  other-pythons  the fast tests in .venv-py312 and .venv-py313, where they were made
                 (make dev-setup PYTHON=python3.12 VENV=.venv-py312)

A part that fails does not stop the others; the exit code is 1 then. Needs `make dev-setup`, and `make newest-core` for
the parts on the newest Megatron-Core.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _environment  # noqa: F401

from megatron_hdpo.health.version_sets import NEWEST_CORE

ROOT = Path(__file__).resolve().parents[1]
NEWEST_FOLDER = ROOT / ".cache" / f"megatron-core-{NEWEST_CORE}"
# Each thing that Megatron-Core is used for, at layouts of one and two ranks. All of a layout is run for its first test.
NEWEST_SUBSET = (
    "tests/checkpoint/test_across_versions.py",
    "tests/checkpoint/test_store.py",
    "tests/weights/test_sharded_writer.py",
    "tests/model/test_policy_layouts.py",
    "tests/model/test_experts.py",
    "tests/model/test_routing_replay.py",
    "tests/model/test_architecture.py",
    "tests/weights/test_mapping.py",
    "tests/weights/test_round_trip.py",
    "tests/weights/test_against_transformers.py",
    "-k",
    "not policy_layouts or ((one_rank or tp2_sp or pp2_vp2 or ep2) and not (dp2 or cp2 or ep2_pp2))",
)
# The tests of a file stay on one of two workers: they share what they prepare.
WORKERS = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
KINDS = ("passed", "failed", "error", "skipped")


@dataclass(frozen=True)
class Part:
    """A run of pytest.

    arguments: what to run. python: the interpreter of its environment. core: the version of Megatron-Core that it must
    run on; None: whatever is installed. variables: for its environment.
    """

    name: str
    arguments: Sequence[str] = ()
    python: Path = Path(sys.executable)
    core: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Outcome of a part: exit code of pytest, seconds, and what it wrote with --summary (nothing if it broke)."""

    part: Part
    code: int
    seconds: float
    told: Mapping[str, Any]

    @property
    def problem(self) -> str | None:
        """Return why the part counts as failed, None for one that passed."""
        if not self.told:
            return f"no summary, exit code {self.code}"
        if self.part.core not in (None, self.told["megatron_core"]):
            return f"ran on megatron-core {self.told['megatron_core']}, not on {self.part.core}"
        return f"exit code {self.code}" if self.code else None


def main() -> None:
    """Run the parts of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS), metavar="PART")
    parser.add_argument("--summary", type=Path, help="write outcomes, seconds and machine of all parts to this file")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    results = [run(part) for name in arguments.parts for part in PARTS[name]()]
    if arguments.summary is not None:
        told = {result.part.name: result.told for result in results}
        arguments.summary.write_text(json.dumps({"outcomes": total(results), "parts": told}, indent=1) + "\n")
    print("\n".join(lines(results)))
    sys.exit(1 if any(result.problem for result in results) else 0)


def run(part: Part) -> Result:
    """Run a part to its end; its output goes where this process's goes."""
    print(f"\n==== tests: {part.name} ====", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        summary, began = Path(folder) / "summary.json", time.monotonic()
        command = [part.python, "-m", "pytest", *WORKERS, "--summary", summary, *part.arguments]
        pytest = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(part.variables))
        try:
            code = pytest.wait()
        except KeyboardInterrupt:
            pytest.terminate()
            pytest.wait()
            raise
        told = json.loads(summary.read_text()) if summary.exists() else {}
        return Result(part, code, time.monotonic() - began, told)


def total(results: Sequence[Result]) -> dict[str, int]:
    """Return the outcomes of all parts together."""
    outcomes: Counter[str] = Counter()
    for result in results:
        outcomes.update(result.told.get("outcomes", {}))
    return {kind: outcomes[kind] for kind in KINDS}


def lines(results: Sequence[Result]) -> Iterator[str]:
    """Yield one line per part, and the total."""
    yield ""
    for result in results:
        told = result.told
        where = f"Python {told['python']}, megatron-core {told['megatron_core']}" if told else "broken off"
        problem = f": FAILED ({result.problem})" if result.problem else ""
        yield f"{result.part.name} ({where}): {_counts(total([result]))} in {result.seconds:.0f} s{problem}"
    yield f"total: {_counts(total(results))} in {sum(result.seconds for result in results):.0f} s"


def _counts(outcomes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in outcomes.items() if count or kind == "passed")


def _newest(name: str, *arguments: str) -> Part:
    path = os.pathsep.join(filter(None, [str(NEWEST_FOLDER), os.environ.get("PYTHONPATH")]))
    return Part(name, arguments, core=NEWEST_CORE, variables={"PYTHONPATH": path})


def _other_pythons() -> list[Part]:
    """Return a part for each environment of another Python, and say which there are none of."""
    found = []
    for version in ("312", "313"):
        python = ROOT / f".venv-py{version}" / "bin" / "python"
        if python.exists():
            found.append(Part(f"py{version}", ("-m", "not slow and not long"), python))
        else:
            print(f"tests: not run on Python {version[0]}.{version[1:]}: there is no {python.parents[1].name}")
    return found


PARTS: dict[str, Callable[[], list[Part]]] = {
    "suite": lambda: [Part("suite")],
    "newest-core": lambda: [_newest("newest-core", *NEWEST_SUBSET)],
    "long": lambda: [Part("long", ("-m", "long", "-o", "timeout=3600"))],
    "newest-whole": lambda: [_newest("newest-whole", "tests/model", "tests/weights", "tests/checkpoint")],
    "other-pythons": _other_pythons,
}


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
