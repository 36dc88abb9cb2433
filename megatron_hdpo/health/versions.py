"""Check that every rank runs the same software on the same recipe.

Otherwise ranks may wait for each other's collectives for ever, or train on different numbers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import megatron_hdpo
from megatron_hdpo.health.findings import CheckResult, named
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.parallel.location import RankLocation

PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "megatron-hdpo")
ABSENT = "absent"


def versions_here(recipe_digest: str) -> dict[str, str]:
    """Return what must be equal on all ranks: name -> version. Imports no further package."""
    versions = {"Python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else ABSENT
    versions["the source of megatron_hdpo"] = source_digest(Path(megatron_hdpo.__file__).parent)
    versions["the recipe"] = recipe_digest
    return versions


def source_digest(folder: Path) -> str:
    """Return a digest of all Python files of a package: equal versions may hide an edited file."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def check_versions(context: ParallelContext, locations: Sequence[RankLocation], own: Mapping[str, str]) -> CheckResult:
    """Compare `own` with the versions of every rank. Collective."""
    return CheckResult(problems=differences(locations, context.gather_objects(dict(own))))


def differences(locations: Sequence[RankLocation], versions: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a sentence for each value that is not equal on all ranks, naming the ranks of the minority."""
    lines = []
    for name in dict.fromkeys(name for own in versions for name in own):
        values = [own.get(name, ABSENT) for own in versions]
        counts = Counter(values).most_common()
        if len(counts) > 1:
            most, count = counts[0]
            others = "; ".join(
                f"{value} on {named([p for p, v in zip(locations, values, strict=True) if v == value])}"
                for value, _ in counts[1:]
            )
            lines.append(f"{name} differs: {most} on {count} of {len(locations)} ranks, but {others}: make them equal")
    return lines


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT
