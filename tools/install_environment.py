"""Make a virtual environment and install this project with some of its extras: what `make setup` runs.

    python3 tools/install_environment.py .venv quickstart

Says how large the download of torch is before it starts. Called again after an interruption it goes on: what has been
installed stays, and pip keeps what it has downloaded. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from relay import INTERRUPTED, Part, PartFailed, Screen, interrupt_on_signals, run

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints"
OLDEST_PYTHON = (3, 11)


def main() -> None:
    """Read the command line and install."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", type=Path, help="folder of the virtual environment")
    parser.add_argument("extras", help="extras of setup.py, separated by commas")
    parser.add_argument("--torch-index", default="", help="package index that torch is taken from; default: pip's own")
    parser.add_argument("--device", default="cpu", help="device of the set of versions: cpu, cu130, ...; default: cpu")
    arguments = parser.parse_args()
    if sys.version_info < OLDEST_PYTHON:
        have, need = (".".join(map(str, version[:2])) for version in (sys.version_info, OLDEST_PYTHON))
        sys.exit(f"this is Python {have}, and {need} or newer is needed: make setup PYTHON=python{need}")
    pinned = constraints(arguments.device)
    if not pinned.exists():
        known = ", ".join(sorted(path.stem for path in CONSTRAINTS.glob(f"{arguments.device}-*.txt")))
        sys.exit(f"there is no {pinned}, the versions for this Python ({known} are there): make setup PYTHON=...")
    interrupt_on_signals()
    screen, began = Screen(), time.monotonic()
    try:
        install(screen, arguments.environment, arguments.extras, arguments.torch_index, pinned)
    except PartFailed as failure:
        sys.exit(str(failure))
    except KeyboardInterrupt:
        screen.line("set-up interrupted: run the same command to go on")
        sys.exit(INTERRUPTED)
    screen.line(f"set-up: {arguments.environment} is ready after {time.monotonic() - began:.0f} s")


def constraints(device: str = "cpu") -> Path:
    """Return the file that pins every version for this Python and a device."""
    return CONSTRAINTS / f"{device}-py{sys.version_info.major}{sys.version_info.minor}.txt"


def install(screen: Screen, environment: Path, extras: str, torch_index: str, pinned: Path) -> None:
    """Install torch, then the project with its extras, at the pinned versions. Raises PartFailed with what pip said."""
    log = environment / "install.log"
    screen.line(f"set-up: {environment}, with the extras {extras}; output of pip in {log}")
    python = environment / "bin" / "python"
    if not python.exists():
        run(screen, Part("virtual environment", [sys.executable, "-m", "venv", environment], log))
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    # Without the index's other packages: those come from pip's own index, at the versions that the constraints pin.
    index = ["--index-url", torch_index, "--no-deps"] if torch_index else []
    torch = ["--constraint", pinned, *index, "torch"]
    _say_sizes(screen, [*pip, "install", "--dry-run", *torch], environment / "torch.json", log)
    run(screen, Part("installing torch", [*pip, "install", *torch], log, matters))
    project = ["--constraint", pinned, "--editable", f"{ROOT}[{extras}]"]
    run(screen, Part("installing the project", [*pip, "install", *project], log, matters))


def matters(line: str) -> bool:
    """Return whether to show this line of pip's output: downloads with their sizes, and errors."""
    return line.strip().startswith(("Downloading", "ERROR", "error:"))


def _say_sizes(screen: Screen, command: Sequence[str | Path], report: Path, log: Path) -> None:
    """Print what pip will download for torch, unless torch is installed already."""
    run(screen, Part("asking for torch's size", [*command, "--report", report], log, lambda line: False))
    files = [entry["download_info"]["url"] for entry in json.loads(report.read_text())["install"]]
    report.unlink()
    if files:
        screen.line(size_sentence(_sizes(screen, files)))


def _sizes(screen: Screen, urls: Sequence[str]) -> dict[str, int | None]:
    with ThreadPoolExecutor() as pool:
        asked = {file_name(url): pool.submit(size_of, url) for url in urls}
        while wait(asked.values(), timeout=0.2).not_done:
            screen.status("  asking for torch's size")
    return {name: answer.result() for name, answer in asked.items()}


def size_sentence(sizes: dict[str, int | None]) -> str:
    """Return a sentence on how much there is to download.

    sizes: bytes of each file, None where the index does not report it.
    """
    known = sum(size for size in sizes.values() if size is not None)
    unknown = [name for name, size in sizes.items() if size is None]
    torch = next((name for name in sizes if name.startswith("torch-")), "torch")
    text = f"to download for torch: {known / 1e6:,.0f} MB in {len(sizes) - len(unknown)} files ({torch}"
    if sizes.get(torch) is not None:
        text += f": {(sizes[torch] or 0) / 1e6:,.0f} MB"
    text += ")"
    if unknown:
        text += f", and {len(unknown)} files of unknown size: {', '.join(unknown)}"
    if any(name.startswith(("nvidia", "cuda")) for name in sizes):
        text += ". This is a build for CUDA; TORCH_INDEX chooses one for CPUs (README)"
    return text


def file_name(url: str) -> str:
    """Return the name of the file that a URL ends in."""
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path.rsplit("/", 1)[-1])


def size_of(url: str) -> int | None:
    """Return the size in bytes of the file at a URL, None where the server does not report it."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10) as answer:
            length = answer.headers.get("Content-Length")
    except OSError:
        return None
    return int(length) if length is not None else None


if __name__ == "__main__":
    main()
