"""Resolve the user's packages for other systems and Python versions, and print the table of docs/platforms.md.

    pip install uv
    python tools/resolve_platforms.py

Nothing is installed. For each system and Python version, `uv` chooses the packages that `make quickstart` installs,
with the versions of that Python's set; the table says which of them have no wheel there and are built from source. It
asks the package index, 12 times for a minute at most.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import _environment  # noqa: F401

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
SYSTEMS = {
    "Linux x86_64": "x86_64-manylinux_2_28",
    "Linux aarch64": "aarch64-manylinux_2_28",
    "macOS 14, arm64": "aarch64-apple-darwin",
    "macOS 14, x86_64": "x86_64-apple-darwin",
}
MACOS = {"MACOSX_DEPLOYMENT_TARGET": "14.0"}  # the oldest for which torch has wheels; uv takes 13.0 by itself


@dataclass(frozen=True)
class Resolved:
    """Result for one system and Python version: the chosen packages, or why there is no solution.

    built: packages without a wheel there. gigabytes: size of all wheels, the largest where several fit.
    """

    packages: int = 0
    built: tuple[str, ...] = ()
    gigabytes: float = 0.0
    failure: str | None = None

    def cell(self) -> str:
        """Return the entry of the table."""
        if self.failure is not None:
            return f"no: {self.failure}"
        built = f"; from source: {', '.join(self.built)}" if self.built else ""
        return f"{self.packages} packages, {self.gigabytes:.1f} GB{built}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--pythons", nargs="+", default=list(PYTHONS), metavar="VERSION")
    arguments = parser.parse_args()
    if importlib.util.find_spec("uv") is None:
        sys.exit("uv is not installed: pip install uv")
    print("| | " + " | ".join(f"Python {version}" for version in arguments.pythons) + " |")
    print("|---" * (len(arguments.pythons) + 1) + "|")
    for system in arguments.systems:
        cells = [resolve(SYSTEMS[system], version).cell() for version in arguments.pythons]
        print(f"| {system} | " + " | ".join(cells) + " |", flush=True)


def resolve(platform: str, python: str) -> Resolved:
    """Resolve for a platform as uv names it and a Python version such as "3.12"."""
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "pylock.toml"
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config", str(ROOT / "setup.py")]
        command += ["--extra=quickstart", "--constraint", str(constraints(python))]
        command += ["--python-platform", platform, "--python-version", python]
        command += ["--format", "pylock.toml", "--output-file", str(lock)]
        done = subprocess.run(command, env=os.environ | MACOS, capture_output=True, text=True)
        if done.returncode:
            return Resolved(failure=_reason(done.stderr))
        return read_lock(tomllib.loads(lock.read_text()))


def constraints(python: str) -> Path:
    """Return the file with the versions for a Python such as "3.12"."""
    return ROOT / "constraints" / f"cpu-py{python.replace('.', '')}.txt"


def read_lock(lock: dict) -> Resolved:
    """Return the result in a pylock.toml: it lists, per package, the wheels that fit the platform."""
    packages: Sequence[dict] = lock["packages"]
    sizes = [max((wheel.get("size", 0) for wheel in package.get("wheels", ())), default=0) for package in packages]
    built = tuple(package["name"] for package in packages if not package.get("wheels"))
    return Resolved(len(packages), built, sum(sizes) / 1e9)


def _reason(said: str) -> str:
    """Return uv's first sentence on why there is no solution."""
    text = " ".join(said.split())
    found = re.search(r"Because (.*?)(?: and you require| we can conclude|, we can|$)", text)
    return found.group(1) if found else text


if __name__ == "__main__":
    main()
