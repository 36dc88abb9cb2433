"""Versions that go together: the sets in `constraints`, and the rules behind them. Needs the standard library only.

`doctor`, `tools/resolve_sets.py` and the table of docs/install.md take them from here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Release = tuple[int, ...]

# From the first on, below the second.
SUPPORTED = {
    "torch": ("2.11", "2.16"),
    "megatron-core": ("0.16.1", "0.20"),
    "transformers": ("5.0", "6"),
    "transformer-engine": ("2.10", "2.21"),
    "sglang": ("0.5.21", "0.6"),
}
PYTHONS = ("3.11", "3.12", "3.13")
SESSIONS_SINCE = "0.5.21"
"""SGLang before this has no weight-update sessions. The trainer still speaks to it; no test does."""
OLDEST_SGLANG = "0.5.15"
"""The trainer refuses servers of an older one."""
NEWEST_SGLANG = "0.5.23"
SGLANG_PINS = {
    "0.5.21": {"torch": "2.13.0", "transformers": "5.12.1"},
    "0.5.22": {"torch": "2.14.1", "transformers": "5.19.0"},
    "0.5.23": {"torch": "2.14.1", "transformers": "5.19.0"},
}
# The wheels of Transformer Engine 2.13 and later need a cuBLAS that comes with torch 2.15.
NEW_CUBLAS_TORCH, NEW_CUBLAS_ENGINE = "2.15", "2.13"
NEWEST_CORE = "0.19.2"
"""The newest megatron-core: the upper end of what the tests run on."""
CORE_FOR_NEW_PYTHON = "0.17"  # needs Python 3.12
CORE_WITH_TRITON = "0.18"  # imports triton, on a CPU too


@dataclass(frozen=True)
class VersionSet:
    """Versions of the packages that decide, for one Python and one device; `constraints/<name>.txt` has all others.

    device: cpu, or the CUDA of the torch that the package index has. evidence: what was done with it, for the table.
    """

    device: str
    python: str
    packages: Mapping[str, str]
    evidence: str

    @property
    def name(self) -> str:
        """Return the name of the set and of its file."""
        return f"{self.device}-py{self.python.replace('.', '')}"


_OLD = {"torch": "2.13.0", "megatron-core": "0.16.1", "transformers": "5.23.0", "triton": "3.7.1"}
_CPU = {"torch": "2.14.1", "megatron-core": NEWEST_CORE, "transformers": "5.23.0", "triton": "3.8.0"}
_ENGINES = {"transformer-engine": "2.12.0", "sglang": "0.5.23", "transformers": "5.19.0"}
_ONE_ENVIRONMENT = _CPU | _ENGINES
_NEWEST = _CPU | {"torch": "2.15.0", "triton": "3.9.0", "transformer-engine": "2.20.2"}
SETS = (
    VersionSet("cpu", "3.11", _OLD, "`make test`"),
    VersionSet("cpu", "3.12", _CPU, "installed, fast tests"),
    VersionSet("cpu", "3.13", _CPU, "resolved"),
    VersionSet("cu130", "3.11", _ONE_ENVIRONMENT | {"megatron-core": "0.16.1"}, "resolved"),
    VersionSet("cu130", "3.12", _ONE_ENVIRONMENT, "installed without Transformer Engine"),
    VersionSet("cu130", "3.13", _ONE_ENVIRONMENT, "resolved"),
    VersionSet("cu132", "3.12", _NEWEST, "resolved, wheels inspected"),
    VersionSet("cu132", "3.13", _NEWEST, "resolved, wheels inspected"),
)


@dataclass(frozen=True)
class Misfit:
    """Something in an environment that does not go together. fatal: a run cannot start with it."""

    text: str
    fatal: bool = False


def release(version: str) -> Release:
    """Return the numbers of a version, without what marks a build or a pre-release: 2.13.0+cpu is (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def misfits(versions: Mapping[str, str], python: str) -> list[Misfit]:
    """Return what does not go together among the installed versions (name -> version) on a Python such as "3.12"."""
    return [
        *_unsupported(versions),
        *_megatron_core(versions, python),
        *_transformer_engine(versions),
        *_sglang(versions),
    ]


def nearest(versions: Mapping[str, str], python: str) -> tuple[VersionSet, list[str]] | None:
    """Return the set that the installed versions are nearest to, and the packages that differ from it.

    SGLang may have an environment of its own, so its absence is no difference. None for a Python without a set.
    """
    found = [(one, _differing(versions, one)) for one in SETS if one.python == python]
    return min(found, key=lambda pair: len(pair[1]), default=None)


def table() -> str:
    """Return the sets as a table in Markdown."""
    columns = ("torch", "megatron-core", "transformer-engine", "sglang", "transformers", "triton")
    lines = [f"| set | Python | {' | '.join(columns)} | what was done |", "|---" * (len(columns) + 3) + "|"]
    for one in SETS:
        absent = {"transformer-engine": "none", "sglang": "own environment"}
        cells = [one.packages.get(name, absent.get(name, "")) for name in columns]
        lines.append(f"| `{one.name}` | {one.python} | {' | '.join(cells)} | {one.evidence} |")
    return "\n".join(lines)


def _differing(versions: Mapping[str, str], one: VersionSet) -> list[str]:
    lines = []
    for name, wanted in one.packages.items():
        have = versions.get(name)
        if have is None and name != "sglang":
            lines.append(f"{name} is missing ({wanted} there)")
        elif have is not None and release(have) != release(wanted):
            lines.append(f"{name} {have} ({wanted} there)")
    engine = "transformer-engine"
    if engine in versions and engine not in one.packages:
        lines.append(f"{engine} {versions[engine]} (none there)")
    return lines


def _unsupported(versions: Mapping[str, str]) -> Iterator[Misfit]:
    for name, (first, end) in SUPPORTED.items():
        have = versions.get(name)
        if have is None or name == "sglang":
            continue
        if release(have) < release(first):
            yield Misfit(f"{name} {have} is too old: pip install '{name}>={first},<{end}'", fatal=True)
        elif release(have) >= release(end):
            yield Misfit(f"{name} {have} is newer than any that was tried: {name}>={first},<{end} is supported")


def _megatron_core(versions: Mapping[str, str], python: str) -> Iterator[Misfit]:
    have = versions.get("megatron-core")
    if have is None:
        return
    if release(have) >= release(CORE_WITH_TRITON) and "triton" not in versions:
        yield Misfit(f"megatron-core {have} imports triton, which is missing: pip install triton", fatal=True)
    if release(have) >= release(CORE_FOR_NEW_PYTHON) and release(python) < (3, 12):
        yield Misfit(f"megatron-core {have} is made for Python 3.12 and newer: Python {python} takes 0.16.1")


def _transformer_engine(versions: Mapping[str, str]) -> Iterator[Misfit]:
    engine, torch = versions.get("transformer-engine"), versions.get("torch")
    if engine is None or torch is None:
        return
    new_engine = release(engine) >= release(NEW_CUBLAS_ENGINE)
    if new_engine == (release(torch) >= release(NEW_CUBLAS_TORCH)):
        return
    bound = f">={NEW_CUBLAS_ENGINE}" if not new_engine else f"<{NEW_CUBLAS_ENGINE}"
    yield Misfit(
        f"transformer-engine {engine} does not go with the cuBLAS of torch {torch} as the package index has it: take "
        f"transformer-engine{bound}"
    )


def _sglang(versions: Mapping[str, str]) -> Iterator[Misfit]:
    have = versions.get("sglang")
    if have is None:
        return
    if release(have) < release(OLDEST_SGLANG):
        yield Misfit(f"sglang {have} is older than {OLDEST_SGLANG}: the trainer refuses its servers")
    elif release(have) < release(SESSIONS_SINCE):
        yield Misfit(
            f"sglang {have} is older than {SESSIONS_SINCE}, the oldest that is tested: its weights are updated without "
            "a session"
        )
    elif release(have) > release(NEWEST_SGLANG):
        yield Misfit(f"sglang {have} is newer than {NEWEST_SGLANG}, the newest that was tried")
    for name, wanted in SGLANG_PINS.get(have, {}).items():
        if name in versions and release(versions[name]) != release(wanted):
            yield Misfit(
                f"sglang {have} pins {name} {wanted}, and {versions[name]} is installed: install that, or give SGLang "
                "an environment of its own (rollout.sglang.servers.python)"
            )
