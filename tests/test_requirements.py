"""The requirements of setup.py: a core without what only some recipes need, extras for the rest, no pins."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from recipes import ROOT

from megatron_hdpo.config import load_recipe
from megatron_hdpo.config.packages import asked_packages
from megatron_hdpo.environment import EXTRAS
from megatron_hdpo.health.doctor import REQUIRED
from megatron_hdpo.health.version_sets import SUPPORTED

LINUX = {"platform_system": "Linux"}


@pytest.fixture(scope="module")
def packaging() -> dict[str, Any]:
    """The arguments of setup()."""
    told: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: told.update(arguments))
        runpy.run_path(str(ROOT / "setup.py"))
    return told


def names(lines: list[str], **environment: str) -> set[str]:
    """The packages that are required where the markers hold."""
    found = map(Requirement, lines)
    return {canonicalize_name(one.name) for one in found if one.marker is None or one.marker.evaluate(environment)}


def test_no_requirement_is_a_pin(packaging: dict[str, Any]) -> None:
    lines = [
        *packaging["install_requires"],
        *(line for extra in packaging["extras_require"].values() for line in extra),
    ]
    assert [line for line in lines if "==" in line.partition(";")[0]] == []


def test_a_missing_package_is_in_the_extra_that_its_message_names(packaging: dict[str, Any]) -> None:
    core = names(packaging["install_requires"])
    for module, extra in EXTRAS.items():
        assert canonicalize_name(module) in names(packaging["extras_require"][extra])
        assert canonicalize_name(module) not in core


def test_the_quickstart_has_what_its_recipes_ask_for(packaging: dict[str, Any]) -> None:
    extra = names(packaging["extras_require"]["quickstart"])
    recipes = sorted((ROOT / "examples" / "quickstart").glob("*.yaml"))
    asked = {package for path in recipes for _, package in asked_packages(load_recipe(path))}
    assert "reasoning_gym" in asked
    assert {canonicalize_name(package) for package in asked} <= extra
    assert {"matplotlib", "tensorboard"} <= extra  # its reports and curves


def test_doctor_asks_for_the_core(packaging: dict[str, Any]) -> None:
    core = names(packaging["install_requires"], **LINUX, python_version="3.11")
    assert {canonicalize_name(name) for name in REQUIRED} == core


@pytest.mark.parametrize(
    ("python", "system", "triton", "newest"),
    [("3.11", "Linux", False, "0.19.2"), ("3.12", "Linux", True, "0.19.2"), ("3.12", "Darwin", False, "0.17.1")],
)
def test_triton_is_required_where_megatron_core_imports_it(
    python: str, system: str, triton: bool, newest: str, packaging: dict[str, Any]
) -> None:
    here = {"python_version": python, "platform_system": system}
    assert ("triton" in names(packaging["install_requires"], **here)) == triton
    (core,) = [
        one.specifier
        for one in map(Requirement, packaging["install_requires"])
        if one.name == "megatron-core" and one.marker is not None and one.marker.evaluate(here)
    ]
    assert core.contains("0.16.1") and core.contains(newest) and not core.contains("0.20")
    assert core.contains("0.18.0") == (system == "Linux")


@pytest.mark.parametrize("name", SUPPORTED)
def test_setup_supports_what_doctor_supports(name: str, packaging: dict[str, Any]) -> None:
    """The union of the ranges: Transformer Engine has one extra per cuBLAS."""
    first, end = map(Version, SUPPORTED[name])
    lines = [
        *packaging["install_requires"],
        *(line for extra in packaging["extras_require"].values() for line in extra),
    ]
    bounds = [bound for one in map(Requirement, lines) if one.name == name for bound in one.specifier]
    assert min(Version(bound.version) for bound in bounds if bound.operator == ">=") == first
    assert max(Version(bound.version) for bound in bounds if bound.operator == "<") == end
