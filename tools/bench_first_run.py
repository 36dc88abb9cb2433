"""Time the first run of a new user: `make quickstart`, and if asked `make test`, in a fresh clone.

    python tools/bench_first_run.py --avx2
    python tools/bench_first_run.py --avx2 --test

Writes benchmarks/first_run.md: the machine, seconds of each part, the longest silence, peak memory and bytes
downloaded. The timed logs stay in --logs. --avx2 hides AVX-512 and bf16 instructions from torch, oneDNN and MKL, so
that the machine computes as most laptops do; the document shows that it does.
Needs psutil, and the Python of an environment with torch for the measurement of products (`make setup` makes one).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import _environment  # noqa: F401
import psutil

ROOT = Path(__file__).resolve().parents[1]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
FLAGS = ("avx", "avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "bf16", "asimd")
MARKS = {
    "set-up": r"^set-up: .* is ready",
    "first point of the curve (before the first step)": r"^ +0  [#.]",
    "first curve (two evaluations of both methods)": r"^ +[1-9]\d*  [#.]",
    "verdict of act one": r"^Held-out sums of 5 and 6",
    "pretrained model fetched": r"^the pretrained model is there",
    "end": r"^quickstart: \d+ s",
}
SAMPLED_EVERY_S = 0.5
TAIL_OF_TESTS = 60
PRODUCTS = """
import json, time, torch
torch.set_num_threads(1)
def seconds(dtype):
    a = torch.randn(64, 576, dtype=dtype, requires_grad=True)
    b = torch.randn(576, 1536, dtype=dtype, requires_grad=True)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        (a @ b).sum().backward()
        best = min(best, time.perf_counter() - began)
    return best
print(json.dumps({"float32": seconds(torch.float32), "bfloat16": seconds(torch.bfloat16)}))
"""


@dataclass
class Timed:
    """A command that has run: its lines with the second of each, its exit code, and its peak memory in bytes.

    peak_bytes: most memory that its processes held together.
    """

    lines: list[tuple[float, str]] = field(default_factory=list)
    seconds: float = 0.0
    code: int = 0
    peak_bytes: int = 0

    @property
    def longest_silence(self) -> tuple[float, str]:
        """Longest time without a new line, in seconds, and the line before it."""
        ends = [at for at, _ in self.lines[1:]] + [self.seconds]
        return max((end - at, text) for (at, text), end in zip(self.lines, ends, strict=True))

    def at(self, pattern: str) -> float | None:
        """Return the second of the first line that the pattern matches, None where there is none."""
        return next((at for at, text in self.lines if re.search(pattern, text)), None)


def main() -> None:
    """Read the command line, run what it asks for and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--avx2", action="store_true", help="emulate a machine without AVX-512 and bf16 instructions")
    parser.add_argument("--test", action="store_true", help="run `make test`, too")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="environment variable")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "first_run.md")
    parser.add_argument("--logs", type=Path, default=Path("runs/first_run"), help="folder of the timed logs")
    arguments = parser.parse_args()
    changes = (AVX2 if arguments.avx2 else {}) | dict(one.split("=", 1) for one in arguments.set)
    arguments.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        runs = {"make quickstart": timed(["make", "quickstart"], clone, changes, arguments.logs / "quickstart.log")}
        if arguments.test:
            runs["make test"] = timed(["make", "test"], clone, changes, arguments.logs / "test.log")
        python = clone / ".venv" / "bin" / "python"
        products = {name: product_seconds(python, env) for name, env in (("as it is", {}), ("emulated", AVX2))}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=clone, capture_output=True, text=True)
        megabytes = downloaded(clone)
    text = document(runs, products, changes, commit.stdout.strip(), megabytes)
    arguments.out.write_text(text, encoding="utf-8")
    print(f"wrote {arguments.out}; timed logs in {arguments.logs}")
    sys.exit(max(run.code for run in runs.values()))


def timed(command: Sequence[str], folder: Path, changes: Mapping[str, str], log: Path) -> Timed:
    """Run a command, show its output, and write each line with its second into the file `log`."""
    result, began = Timed(), time.monotonic()
    # A new user has no virtual environment and no PYTHONPATH.
    left_out = ("VIRTUAL_ENV", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | dict(changes)
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watch = threading.Thread(target=_watch_memory, args=(process, result), daemon=True)
    watch.start()
    # By a thread that writes nothing: while a checkpoint is saved, a write to the log may take seconds.
    lines: queue.Queue[tuple[float, str] | None] = queue.Queue()
    threading.Thread(target=_stamp, args=(process, began, lines), daemon=True).start()
    with log.open("w", encoding="utf-8") as file:
        while (stamped := lines.get()) is not None:
            at, line = stamped
            result.lines.append((at, line.rstrip("\n")))
            file.write(f"{at:8.1f} {line}")
            file.flush()
            print(line, end="", flush=True)
    result.code, result.seconds = process.wait(), time.monotonic() - began
    watch.join()
    return result


def _stamp(process: subprocess.Popen[str], began: float, lines: queue.Queue[tuple[float, str] | None]) -> None:
    """Put every line of the command's output into the queue with its second, and None at the end."""
    assert process.stdout is not None
    for line in process.stdout:
        lines.put((time.monotonic() - began, line))
    lines.put(None)


def _watch_memory(process: subprocess.Popen[str], result: Timed) -> None:
    """Sum the proportional set size (memory shared by n processes counts 1/n) over the command's processes."""
    while process.poll() is None:
        total = 0
        for one in _tree(process.pid):
            try:
                full = one.memory_full_info()
                total += getattr(full, "pss", full.rss)
            except psutil.Error:  # it has ended meanwhile
                continue
        result.peak_bytes = max(result.peak_bytes, total)
        time.sleep(SAMPLED_EVERY_S)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []


def downloaded(clone: Path) -> str:
    """Return how much pip has downloaded, from the sizes that it printed."""
    units = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
    log = (clone / ".venv" / "install.log").read_text(encoding="utf-8", errors="replace")
    sizes = [float(n) * units[unit] for n, unit in re.findall(r"Downloading \S+ \(([\d.]+) (kB|MB|GB)\)", log)]
    taken = len(re.findall(r"Using cached|Processing \S+\.whl", log))
    text = f"{sum(sizes) / 1e6:,.0f} MB in {len(sizes)} files by pip"
    return text + (f", and {taken} files that lay on this machine already" if taken else "")


def product_seconds(python: Path, changes: Mapping[str, str]) -> dict[str, float]:
    """Return the seconds of a product of 64 x 576 by 576 x 1536 with its backward pass, by dtype, in one thread."""
    done = subprocess.run(
        [python, "-c", PRODUCTS], env={**os.environ, **changes}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def document(
    runs: Mapping[str, Timed],
    products: Mapping[str, Mapping[str, float]],
    changes: Mapping[str, str],
    commit: str,
    megabytes: str,
) -> str:
    """Return the text of first_run.md."""
    how = "python tools/bench_first_run.py" + (" --avx2" if AVX2.items() <= changes.items() else "")
    how += " --test" if "make test" in runs else ""
    lines = ["# The first run of a new user", "", f"    {how}", "", *_machine(products, changes, commit)]
    for name, run in runs.items():
        silence, before = run.longest_silence
        lines += ["", f"## `{name}`", "", "| what | measured |", "|---|---|", f"| exit code | {run.code} |"]
        if name == "make quickstart":
            lines += [f"| {what} | {_after(run, pattern)} |" for what, pattern in MARKS.items()]
            fetched = next((text for _, text in run.lines if text.startswith("downloaded")), "not downloaded")
            lines += [f"| downloaded for the set-up | {megabytes} |", f"| pretrained model's wheel | {fetched} |"]
        lines += [
            f"| whole | {run.seconds:.0f} s |",
            f"| longest silence | {silence:.1f} s, after `{before.strip()[:60]}` |",
            f"| peak memory of all its processes | {run.peak_bytes / 2**30:.1f} GiB |",
        ]
        tail = TAIL_OF_TESTS if name == "make test" else 40
        shown = [f"{at:8.1f} {text}" for at, text in run.lines if not text.startswith("  ")]
        lines += ["", "The end of its log, with the seconds of each line:", "", "```", *shown[-tail:], "```"]
    return "\n".join(lines) + "\n"


def _machine(products: Mapping[str, Mapping[str, float]], changes: Mapping[str, str], commit: str) -> list[str]:
    model, flags = _cpu()
    ratios = {name: of["bfloat16"] / of["float32"] for name, of in products.items()}
    memory = psutil.virtual_memory().total / 2**30
    variables = " ".join(f"{name}={value}" for name, value in changes.items()) or "none"
    return [
        f"Commit {commit}, {time.strftime('%Y-%m-%d')}. {model}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}.",
        f"Its own flags: {' '.join(flags) or 'unknown'}. Environment variables set for the runs: `{variables}`.",
        "",
        "A product of 64 x 576 by 576 x 1536 with its backward pass, in one thread, in bfloat16 takes "
        f"{ratios['as it is']:.1f} times as long as in float32 on this machine as it is, and "
        f"{ratios['emulated']:.1f} times under the variables of `--avx2`.",
    ]


def _cpu() -> tuple[str, list[str]]:
    """Return the processor's name and its flags that matter for products."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine(), []
    text = info.read_text()
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    found = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    present = found[1].split() if found else []
    return (name[1] if name else platform.machine()), [flag for flag in FLAGS if flag in present]


def _after(run: Timed, pattern: str) -> str:
    at, ready = run.at(pattern), run.at(MARKS["set-up"])
    if at is None:
        return "not reached"
    since = f", {at - ready:.0f} s after the set-up" if ready is not None and at > ready else ""
    return f"{at:.0f} s{since}"


if __name__ == "__main__":
    main()
