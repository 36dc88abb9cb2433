"""Measure the start of a run with many problems: the load that checks them, and the next one, from the cache.

    python tools/bench_data.py --rows 1000000 --json benchmarks/data.json

Problems are made up: word problems with worked solutions of several hundred characters, a share of whose answers are
LaTeX that math-verify has to parse. Every load is a process of its own; its time is that of the load alone, without
imports, its memory the peak of the process. The problems of both loads are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _environment  # noqa: F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_hdpo.data.config import DataConfig
from megatron_hdpo.data.load import load, problem_folder

CHAT_TEMPLATE = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}<|start|>assistant\n"
WORDS = ("train", "station", "noon", "boxes", "apples", "each", "of", "them", "costs", "more", "than", "the", "first")


def main() -> None:
    """Run the measurement, or one load of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, default=100_000, help="training problems; as many as 1000 of them are evaluated on"
    )
    parser.add_argument("--latex", type=float, default=0.01, help="share of the answers that are LaTeX")
    parser.add_argument("--folder", type=Path, help="where rows and cache are kept; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(measured_load(options.load)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        report = measure(options, options.folder or Path(scratch))
    text = json.dumps(report, indent=2) + "\n"
    print(text, end="")
    if options.json:
        options.json.write_text(text)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the report of both loads, and their ratios."""
    section = write_section(folder, options.rows, options.latex)
    first, second = load_in_a_process(section), load_in_a_process(section)
    if not first["checked"] or second["checked"]:
        raise SystemExit(f"the first load must fill the cache and the second read it: empty {folder / 'cache'}")
    if first["problems"] != second["problems"]:
        raise SystemExit("the problems from the cache are not those that were checked")
    config = DataConfig.model_validate_json(section.read_text())
    return {
        "rows": options.rows,
        "rows_MB": sum(task.path.stat().st_size for task in config.train) / 1e6,
        "latex_share": options.latex,
        "cores": len(os.sched_getaffinity(0)),
        "checked": first,
        "from_cache": second,
        "cache_MB": sum(file.stat().st_size for file in problem_folder(config).iterdir()) / 1e6,
        "times_faster": first["seconds"] / second["seconds"],
        "peak_memory_ratio": second["peak_GB"] / first["peak_GB"],
    }


def write_section(folder: Path, rows: int, latex: float) -> Path:
    """Write the rows and a data section that reads them; return the section's file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed, count in (("train", 1, rows), ("held-out", 2, min(1000, rows))):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in made_up(count, seed, latex))
    tasks = {name: [{"kind": "jsonl", "path": str(folder / f"{name}.jsonl")}] for name in ("train", "held-out")}
    section = {"train": tasks["train"], "evaluation": tasks["held-out"], "cache_dir": str(folder / "cache")}
    path = folder / "section.json"
    path.write_text(json.dumps(section))
    return path


def made_up(count: int, seed: int, latex: float) -> Iterator[dict[str, Any]]:
    """Yield rows with a question, a worked solution and an answer."""
    rng = random.Random(seed)
    for index in range(count):
        a, b = rng.randrange(2, 10**6), rng.randrange(2, 10**6)
        answer = f"\\frac{{{a}}}{{{b}}}" if rng.random() < latex else str(a)
        text = " ".join(rng.choices(WORDS, k=40))
        yield {
            "problem": f"Problem {seed}.{index}: {text}, {a} and {b}. How many are left?",
            "solution": f"First, {text}. Then, {' '.join(rng.choices(WORDS, k=60))}. So it is \\boxed{{{answer}}}.",
            "answer": answer,
            "level": index % 5,
        }


def load_in_a_process(section: Path) -> dict[str, Any]:
    """Return what `measured_load` measures in a new process."""
    command = [sys.executable, __file__, "--load", str(section)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measured_load(section: Path) -> dict[str, Any]:
    """Load once; return the seconds, the peak memory, and a digest of all problems and of what was left out."""
    config, tokenizer = DataConfig.model_validate_json(section.read_text()), byte_tokenizer()
    began = time.perf_counter()
    data = load(config, tokenizer)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    digest = hashlib.sha256("\n".join(data.report.lines()).encode())
    for problem in (*data.train, *data.evaluation):
        digest.update(f"{problem} {problem.metadata}".encode())
    checked = all(origin.fresh for origin in data.origins.values())
    return {
        "checked": checked,
        "seconds": seconds,
        "peak_GB": peak,
        "kept": len(data.train),
        "problems": digest.hexdigest(),
    }


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per byte with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", additional_special_tokens=["<|start|>"]
    )
    found.chat_template = CHAT_TEMPLATE
    return found


if __name__ == "__main__":
    main()
