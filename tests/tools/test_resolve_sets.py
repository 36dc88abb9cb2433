"""Files of `constraints`: what the resolver is asked, and what is kept of its answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import resolve_sets
from resolve_sets import HEADER, extras, resolve

from megatron_hdpo.health.version_sets import SETS, VersionSet

NAMED = {one.name: one for one in SETS}
Asked = list[str]


@pytest.fixture
def resolver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Asked]:
    """Puts an answer in place of uv's; returns the command that it will have been given."""

    def answer(text: str, error: str = "") -> Asked:
        asked: Asked = []

        def run(command: list[str], **_: object) -> CompletedProcess[str]:
            asked.extend(command)
            folder = Path(command[command.index("--output-file") + 1]).parent
            asked.extend((folder / name).read_text() for name in ("constraints.txt", "uv.toml"))
            (folder / "resolved.txt").write_text(text)
            return CompletedProcess(command, int(bool(error)), "", error)

        monkeypatch.setattr(resolve_sets.subprocess, "run", run)
        return asked

    monkeypatch.setattr(resolve_sets, "FOLDER", tmp_path)
    return answer


ANSWER = "nvidia-cublas==13.1.1.3\npebble==5.2.3\ntorch==2.14.1\n"


@pytest.mark.parametrize("name", ["cpu-py312", "cu130-py312"])
def test_a_set_for_a_cpu_leaves_cuda_to_torch(name: str, resolver, tmp_path: Path) -> None:
    asked, kept = resolver(ANSWER), ANSWER if name == "cu130-py312" else ANSWER.partition("\n")[2]
    assert resolve(NAMED[name]) is None
    assert (tmp_path / f"{name}.txt").read_text() == HEADER + kept
    assert asked[asked.index("--python-version") + 1] == "3.12"
    constraints, metadata = asked[-2:]
    assert "torch==2.14.1\n" in constraints and "megatron-core==0.19.2\n" in constraints
    assert ("transformer-engine-cu13==2.12.0" in metadata) == (name == "cu130-py312")


def test_a_set_without_a_solution_keeps_its_file(resolver, tmp_path: Path) -> None:
    path = tmp_path / "cpu-py312.txt"
    path.write_text("torch==2.14.1\n")
    resolver("", error="no\n  solution")
    assert resolve(NAMED["cpu-py312"]) == "no solution"
    assert path.read_text() == "torch==2.14.1\n"


@pytest.mark.parametrize(
    ("name", "wanted", "glibc"),
    [
        ("cpu-py311", {"quickstart", "dev"}, "2_28"),
        ("cu130-py312", {"all", "gpu", "sglang"}, "2_34"),
        ("cu132-py312", {"all", "gpu-torch215"}, "2_28"),
    ],
)
def test_what_a_set_is_resolved_for(name: str, wanted: set[str], glibc: str, resolver) -> None:
    one: VersionSet = NAMED[name]
    asked = resolver(ANSWER)
    resolve(one)
    assert set(extras(one)) == wanted == {word[8:] for word in asked if word.startswith("--extra=")}
    assert f"x86_64-manylinux_{glibc}" in asked
