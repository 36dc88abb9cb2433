"""Resolve the sets of versions that go together, and write one file of `constraints` for each.

    pip install uv
    python tools/resolve_sets.py                    # all sets
    python tools/resolve_sets.py cpu-py312 --upgrade
    python tools/resolve_sets.py --table            # the table of docs/install.md; asks nobody

megatron_hdpo/health/version_sets.py holds the versions that decide. `uv` chooses all others from the package index for
Linux on x86_64; nothing is installed. A version that the file has stays as long as it fits; --upgrade takes the newest.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import _environment  # noqa: F401

from megatron_hdpo.health.version_sets import NEW_CUBLAS_TORCH, SETS, VersionSet, release, table

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "constraints"
OUT = "resolved.txt"
GLIBC, GLIBC_OF_SGLANG = "2_28", "2_34"
# A set without a file begins with the versions of this one, so that sets differ in what has to differ.
SEED = FOLDER / "cpu-py311.txt"
HEADER = "# Written by tools/resolve_sets.py. docs/install.md has the table of sets.\n"
# torch itself pins what it needs of CUDA, and a build for CPUs needs none of it.
OF_TORCH = ("nvidia-", "cuda-")
# What Transformer Engine's torch part requires. The index has its source package only, which cannot be asked without
# torch and CUDA. The last one is new in some version after 2.12; it is resolved for all.
ENGINE_REQUIREMENTS = (
    "torch>=2.1",
    "einops",
    "onnxscript",
    "onnx",
    "packaging",
    "pydantic",
    "nvdlfw-inspect",
    "nvidia-cudnn-frontend",
)


def main() -> None:
    """Write the files, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="sets; default: all", metavar="SET")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    parser.add_argument("--table", action="store_true", help="print the table of docs/install.md, and resolve nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    if unknown := set(arguments.names) - {one.name for one in SETS}:
        parser.error(f"no such set: {', '.join(sorted(unknown))}; there are {', '.join(one.name for one in SETS)}")
    if importlib.util.find_spec("uv") is None:
        sys.exit("uv is not installed: pip install uv")
    failed = False
    for one in SETS:
        if not arguments.names or one.name in arguments.names:
            reason = resolve(one, arguments.upgrade)
            print(f"{one.name}: {'written' if reason is None else f'no solution: {reason}'}", flush=True)
            failed |= reason is not None
    sys.exit(1 if failed else 0)


def resolve(one: VersionSet, upgrade: bool = False) -> str | None:
    """Write the file of a set. Return None, or why there is no solution."""
    path = FOLDER / f"{one.name}.txt"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "constraints.txt").write_text("".join(f"{key}=={value}\n" for key, value in one.packages.items()))
        (folder / "uv.toml").write_text(_metadata(one))
        if not upgrade:
            (folder / OUT).write_text((path if path.exists() else SEED).read_text())
        done = subprocess.run(_command(one, folder), capture_output=True, text=True)
        if done.returncode:
            return " ".join(done.stderr.split())
        path.write_text(HEADER + "".join(_kept(one, (folder / OUT).read_text())))
        return None


def _command(one: VersionSet, folder: Path) -> list[str]:
    """Return the command that resolves a set into the file OUT of a folder, which begins with what it holds."""
    wanted = extras(one)
    glibc = GLIBC_OF_SGLANG if "sglang" in wanted else GLIBC
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", str(ROOT / "setup.py")]
    command += ["--config-file", str(folder / "uv.toml"), "--constraint", str(folder / "constraints.txt")]
    command += ["--python-version", one.python, "--python-platform", f"x86_64-manylinux_{glibc}"]
    command += ["--no-header", "--no-annotate", "--output-file", str(folder / OUT)]
    return [*command, *(f"--extra={extra}" for extra in wanted)]


def extras(one: VersionSet) -> list[str]:
    """Return the extras of setup.py that a set is resolved for."""
    if one.device == "cpu":
        return ["quickstart", "dev"]
    newest = release(one.packages["torch"]) >= release(NEW_CUBLAS_TORCH)
    engine = "gpu-torch215" if newest else "gpu"
    return ["all", engine, *(["sglang"] if "sglang" in one.packages else [])]


def _metadata(one: VersionSet) -> str:
    """Return uv's configuration that states the requirements of Transformer Engine's torch part."""
    version = one.packages.get("transformer-engine")
    if version is None:
        return ""
    asked = [*ENGINE_REQUIREMENTS, f"transformer-engine-cu13=={version}"]
    lines = ", ".join(f'"{requirement}"' for requirement in asked)
    entry = f'name = "transformer-engine-torch"\nversion = "{version}"\nrequires-dist = [{lines}]\n'
    return f"[[dependency-metadata]]\n{entry}"


def _kept(one: VersionSet, text: str) -> Iterator[str]:
    """Yield the pins of a file that uv wrote, without what torch pins itself where no CUDA is wanted."""
    for line in text.splitlines(keepends=True):
        if not (one.device == "cpu" and line.startswith(OF_TORCH)):
            yield line


if __name__ == "__main__":
    main()
