"""Which versions go together: pure rules, and one table for setup.py, constraints, doctor and the documents."""

from __future__ import annotations

import pytest
from recipes import ROOT

from megatron_hdpo.health import version_sets
from megatron_hdpo.health.version_sets import SETS, VersionSet, misfits, nearest, release
from megatron_hdpo.rollout.sglang.servers.config import OLDEST_SGLANG

FITS = {"torch": "2.14.1", "megatron-core": "0.19.2", "transformers": "5.19.0", "triton": "3.8.0"}


def texts(python: str = "3.12", **versions: str | None) -> list[str]:
    """What does not fit in FITS with these changes; None: not installed. Underscores stand for hyphens."""
    changed = FITS | {name.replace("_", "-"): version for name, version in versions.items()}
    return [one.text for one in misfits({k: v for k, v in changed.items() if v is not None}, python)]


@pytest.mark.parametrize("one", SETS, ids=lambda one: one.name)
def test_nothing_in_a_set_is_a_misfit(one: VersionSet) -> None:
    assert misfits(one.packages, one.python) == []
    assert nearest(one.packages, one.python) == (one, [])


def test_builds_and_prereleases_count_as_their_release() -> None:
    assert release("2.13.0+cpu") == release("2.13.0a0+git.nv26.10") == (2, 13, 0)
    assert release("unknown") == ()
    assert texts(torch="2.14.1+cu130") == []


@pytest.mark.parametrize(
    ("engine", "torch", "take"),
    [("2.13.0", "2.14.1", "<2.13"), ("2.20.2", "2.11.0+cu130", "<2.13"), ("2.12.0", "2.15.0", ">=2.13")],
)
def test_transformer_engine_of_another_cublas(engine: str, torch: str, take: str) -> None:
    (said,) = texts(transformer_engine=engine, torch=torch)
    assert said.startswith(f"transformer-engine {engine} ") and f"torch {torch} " in said
    assert said.endswith(f"take transformer-engine{take}")


@pytest.mark.parametrize(("engine", "torch"), [("2.10.0", "2.11.0"), ("2.12.0", "2.14.1"), ("2.13.0", "2.15.0")])
def test_transformer_engine_that_goes_with_torch(engine: str, torch: str) -> None:
    assert texts(transformer_engine=engine, torch=torch) == []


@pytest.mark.parametrize(
    ("core", "python", "triton", "fatal"),
    [
        ("0.16.1", "3.11", None, []),
        ("0.17.1", "3.12", None, []),
        ("0.18.0", "3.12", None, [True]),
        ("0.19.2", "3.12", "3.8.0", []),
        ("0.19.2", "3.11", "3.8.0", [False]),
        ("0.19.2", "3.11", None, [True, False]),
    ],
)
def test_megatron_core_needs_triton_from_0_18_and_a_newer_python_from_0_17(
    core: str, python: str, triton: str | None, fatal: list[bool]
) -> None:
    versions = {"megatron-core": core} | ({"triton": triton} if triton else {})
    found = misfits(versions, python)
    assert [one.fatal for one in found] == fatal
    assert [("triton" in one.text) for one in found] == fatal


@pytest.mark.parametrize(
    ("name", "version", "fatal"),
    [("torch", "2.10.0", True), ("torch", "2.16.0", False), ("transformers", "4.57.1", True),
     ("megatron-core", "0.15.0", True), ("megatron-core", "0.20.0", False)],
)  # fmt: skip
def test_too_old_does_not_run_and_too_new_was_not_tried(name: str, version: str, fatal: bool) -> None:
    (one,) = misfits(FITS | {name: version}, "3.12")
    assert one.fatal == fatal and one.text.startswith(f"{name} {version} is ")


def test_sglang_beside_the_trainer_needs_the_versions_that_it_pins() -> None:
    assert texts(sglang="0.5.23") == texts(sglang="0.5.22") == []
    assert texts(sglang="0.5.21", torch="2.13.0+cpu", transformers="5.12.1") == []
    said = texts(sglang="0.5.21")
    assert [line.split(", and ")[0] for line in said] == [
        "sglang 0.5.21 pins torch 2.13.0",
        "sglang 0.5.21 pins transformers 5.12.1",
    ]
    assert all("rollout.sglang.servers.python" in line for line in said)


def test_other_versions_of_sglang_were_not_tried() -> None:
    (old,) = texts(sglang="0.5.20")
    assert old.startswith("sglang 0.5.20 is older than 0.5.21, the oldest that is tested")
    (refused,) = texts(sglang="0.5.14")
    assert refused == f"sglang 0.5.14 is older than {OLDEST_SGLANG}: the trainer refuses its servers"
    (new,) = texts(sglang="0.5.24")
    assert new == "sglang 0.5.24 is newer than 0.5.23, the newest that was tried"


def test_the_nearest_set_and_what_differs() -> None:
    found = nearest(FITS | {"transformer-engine": "2.11.0", "torch": "2.11.0+cu130"}, "3.12")
    assert found is not None
    one, differing = found
    assert one.name == "cu130-py312"
    assert differing == ["torch 2.11.0+cu130 (2.14.1 there)", "transformer-engine 2.11.0 (2.12.0 there)"]
    assert nearest(FITS, "3.14") is None


def test_a_missing_package_differs_and_a_missing_sglang_does_not() -> None:
    cu130 = next(one for one in SETS if one.name == "cu130-py312")
    versions = {name: version for name, version in cu130.packages.items() if name != "sglang"}
    assert nearest(versions, "3.12") == (cu130, [])
    del versions["triton"]
    assert nearest(versions, "3.12") == (cu130, ["triton is missing (3.8.0 there)"])


def test_a_transformer_engine_that_the_set_lacks_differs() -> None:
    found = nearest(FITS | {"transformers": "5.23.0", "transformer-engine": "2.12.0"}, "3.12")
    assert found is not None and found[1] != []


def test_the_constraints_are_those_of_the_sets() -> None:
    for one in SETS:
        lines = (ROOT / "constraints" / f"{one.name}.txt").read_text().splitlines()
        pins = dict(line.split("==") for line in lines if not line.startswith("#"))
        ours = {name: version for name, version in one.packages.items() if name in pins}
        assert {name: pins[name] for name in ours} == ours
        assert set(one.packages) - set(ours) <= {"sglang"}  # where it has an environment of its own
    assert {path.stem for path in (ROOT / "constraints").iterdir()} == {one.name for one in SETS}


def test_the_document_shows_the_table_of_sets() -> None:
    assert version_sets.table() in (ROOT / "docs" / "install.md").read_text()
