"""Run every check that needs a GPU, in a few minutes, and write the results into one JSON file.

    python tools/check_gpu.py --out benchmarks/gpu.json --model runs/smollm2-135m-instruct --problems gsm8k_train.jsonl

Checks. Each is recorded with its numbers or its error, is bounded in time, and does not stop the others; the file is
written whenever a number is known, so that a run that is killed leaves those that it had:
  environment   versions, GPU, what is installed
  kernels       attention, the head, the checksum of weights: outputs and gradients against float64 on the host
  layer_specs   Transformer Engine's spec against plain torch: log-probs and gradients of a model with the same weights
  fp8           loss of 50 updates in every FP8 recipe of the GPU against bfloat16: difference, seconds, memory
  recompute     memory and seconds without, with selective and with full recompute; gradients must be the same
  offload       memory and seconds with none, half and all of the optimizer on the host; weights must be the same
  checkpoint    seconds to write and read both kinds of checkpoint; updates after it must be the same
  overlap       seconds of an update with and without overlap over all GPUs; weights must be the same
  planned       the planner's memory of an update against what torch allocated
  embedded      the embedded engine: tokens per second, and its log-probs against the trainer's
  divergence    Triton kernels against the torch reference and against the copy bandwidth (tools/bench_divergence.py)
  step          HDPO step against GRPO step, packed against padded, against transformers (tools/bench_step.py)
  sglang        an SGLang server on the GPU: weights by CUDA IPC, NCCL and disk, each through the gate, and its speed
                (tools/bench_rollout.py); reported as not installed where SGLang is not in this environment
  run           a whole HDPO run on the GPU: engine, self-test, training, checkpoint, export (examples/digit_sums)
  learning      HDPO of --model on --problems (JSON lines of problem, answer, solution), else on reasoning-gym's
                arithmetic: pass rates before and after

Without --model every check but learning uses a random model, small enough for milliseconds per pass on a GPU. The
script needs the package's core dependencies; layer_specs, fp8 and offload also need transformer-engine. No network.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import _environment  # noqa: F401
import torch
from _python_parts import PartError, run_python

# Seconds of the training side of an HDPO step, divided by those of a GRPO step on the same rollouts.
STEP_TARGETS = {"HDPO, teacher from the rollout": 1.10, "HDPO, teacher from the trainer": 1.25}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # it runs from a plain copy of the repository, too


@dataclass(frozen=True)
class Run:
    """What a check gets.

    folder: for its files, the same for all checks. deadline: of all checks together, on time.monotonic's clock. note:
    called with results of the check as soon as they are known.
    """

    device: str
    model: Path | None
    problems: Path | None
    folder: Path
    deadline: float = math.inf
    note: Callable[[Mapping[str, Any]], None] = lambda found: None

    @property
    def on_gpu(self) -> bool:
        """Return whether the checks measure a GPU; else they only test this script."""
        return self.device == "cuda"


class Report:
    """The JSON file of the results, whole at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Any] = {"command": sys.argv}

    def write(self, name: str, result: Mapping[str, Any]) -> None:
        """Write the file with the present results of one check."""
        self.results[name] = dict(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.new")
        beside.write_text(json.dumps(self.results, indent=1))
        beside.replace(self.path)


def main() -> None:
    """Run the checks of the command line; exit with 1 when one failed."""
    arguments = _arguments()
    names = arguments.only or list(CHECKS)
    report = Report(arguments.out)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            arguments.device,
            arguments.model and arguments.model.resolve(),  # parts run in the root of the repository
            arguments.problems,
            Path(folder),
            time.monotonic() + arguments.seconds,
        )
        for name in names:
            _attempt(name, run, report)
    sys.exit(0 if all(report.results[name]["ok"] for name in names) else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--device", default="cuda", help="cpu: only to test this script, without what needs a GPU")
    parser.add_argument("--model", type=Path, help="Hugging Face checkpoint folder; default: random weights")
    parser.add_argument("--problems", type=Path, help="JSON lines to learn from, such as GSM8K's")
    parser.add_argument("--only", nargs="*", choices=CHECKS, help="run only these checks")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all checks together; default: no limit")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("check_gpu: torch finds no GPU here; `megatron_hdpo doctor` says more, --device cpu tests the script")
    return arguments


def _attempt(name: str, run: Run, report: Report) -> None:
    """Run a check and report it; until it ends, the report says that it is running, with what it has found."""
    found: dict[str, Any] = {}

    def note(more: Mapping[str, Any]) -> None:
        found.update(more)
        report.write(name, found | {"ok": False, "error": "it was still running when this was written"})

    began = time.perf_counter()
    note({})
    try:
        result = {"ok": True} | CHECKS[name](replace(run, note=note))
    except Exception as error:
        text = str(error) if isinstance(error, PartError) else traceback.format_exc(limit=6)
        result = {"ok": False, "error": text}
    seconds = time.perf_counter() - began
    report.write(name, found | result | {"seconds": seconds})
    print(f"{name}: {'ok' if result['ok'] else 'FAILED'} in {seconds:.0f} s", flush=True)


def environment(run: Run) -> dict[str, Any]:
    """Report the findings of the doctor on this machine."""
    from megatron_hdpo.health.doctor import findings

    found = list(findings())
    return {"ok": all(fine is not False for _, fine in found), "findings": [line for line, _ in found]}


def kernels(run: Run) -> dict[str, Any]:
    """Compare the kernels that only a GPU runs with float64 on the host."""
    return _trial(run, "kernels", _tiny(run))


def layer_specs(run: Run) -> dict[str, Any]:
    """Compare the two specs in float32 and bfloat16, over packed sequences of different lengths."""
    return _trial(run, "specs", _tiny(run))


def trial(name: str, run: Run, ranks: int = 1) -> dict[str, Any]:
    """Run a trial of tools/gpu_trials.py on a model whose products take realistic time."""
    small = ["--prompt", "8", "--response", "8", "--micro-batch-tokens", "32", "--steps", "3"]
    return _trial(run, name, run.model or _random_model(run), *([] if run.on_gpu else small), ranks=ranks)


def overlap(run: Run) -> dict[str, Any]:
    """Run the overlap trial over every GPU of the machine; with two ranks on a CPU."""
    return trial("overlap", run, torch.cuda.device_count() if run.on_gpu else 2)


def divergence(run: Run) -> dict[str, Any]:
    """Return the table of tools/bench_divergence.py."""
    out = run.folder / "divergence.json"
    sizes = ["--tokens", "8192", "--vocab", "151936", "--dtype", "bfloat16"] if run.on_gpu else []
    _python(run, [_tool("bench_divergence"), "--device", run.device, "--json", str(out), *sizes])
    return {"table": json.loads(out.read_text())}


def step(run: Run) -> dict[str, Any]:
    """Return the table of tools/bench_step.py, and its ratios to GRPO with their targets."""
    out, model = run.folder / "step.json", run.model or _random_model(run)
    sizes = ["--rounds", "1", "--prompts", "3", "--samples", "2", "--survivors", "1", "--response-tokens", "8"]
    if run.on_gpu:
        sizes = ["--prompts", "24", "--prompt-tokens", "256", "--response-tokens", "1024"]
        sizes += ["--micro-batch-tokens", "16384"]
    _python(run, [_tool("bench_step"), "--model", str(model), "--device", run.device, "--json", str(out), *sizes])
    table = json.loads(out.read_text())
    ratios = {row["what"]: row["ratio"] for row in table["rows"]}
    targets = {
        what: {"ratio": ratios[what], "target": target, "met": ratios[what] <= target}
        for what, target in STEP_TARGETS.items()
    }
    return {"against GRPO": targets, "table": table}


def sglang(run: Run) -> dict[str, Any]:
    """Return the table of tools/bench_rollout.py; the pushes of each path must pass the gate."""
    if importlib.util.find_spec("sglang") is None:
        return {"installed": False}
    out = run.folder / "rollout.json"
    try:
        _python(run, [_tool("bench_rollout"), "--device", run.device, "--out", str(out)], seconds=600.0)
    finally:  # it writes what it has after every measurement
        run.note({"installed": True, "table": json.loads(out.read_text()) if out.exists() else None})
    return {}


def train(run: Run) -> dict[str, Any]:
    """Train examples/digit_sums for a few steps; return the last line of its metrics."""
    output = run.folder / "run"
    overrides = [f"model.path={_tiny(run)}", f"output={output}", f"device={run.device}"]
    overrides += ["train.steps=5", "warmup.steps=50", "evaluation.every=null"]
    try:
        _python(run, ["-m", "megatron_hdpo", "train", str(ROOT / "examples" / "digit_sums" / "hdpo.yaml"), *overrides])
    finally:
        run.note({"metrics": (_metrics(output) or [None])[-1]})
    return {}


def learning(run: Run) -> dict[str, Any]:
    """Train the quickstart's recipe for a few steps, on --problems if given; return its evaluations."""
    if run.model is None:
        return {"skipped": "no --model: there is nothing to teach"}
    output = run.folder / "learning"
    overrides = [f"model.path={run.model}", f"output={output}", f"device={run.device}", "parallel.pipeline=1"]
    overrides += ["threads_per_rank=null", "rollout.max_new_tokens=192", "train.micro_batch_tokens=8192"]
    overrides += ["rollout.prompts_per_step=32", "rollout.embedded.max_batch_sequences=256", "train.steps=20"]
    overrides += ["warmup.examples_per_step=64", "evaluation.max_new_tokens=192", "model.max_sequence=1024"]
    if run.problems is not None:
        rows = run.problems.read_text(encoding="utf-8").splitlines()
        for name, part in (("train", rows[:-64]), ("evaluation", rows[-64:])):
            path = run.folder / f"{name}.jsonl"
            path.write_text("\n".join(part) + "\n", encoding="utf-8")
            overrides.append(f"data.{name}=[{{kind: jsonl, name: {name}, path: {path}}}]")
        overrides += ["data.prompts.max_prompt_tokens=320", "data.prompts.max_privileged_tokens=640"]
    recipe = str(ROOT / "examples" / "quickstart" / "hdpo.yaml")
    try:
        _python(run, ["-m", "megatron_hdpo", "train", recipe, *overrides], seconds=900.0)
    finally:
        lines = _metrics(output)
        evaluated = [{k: v for k, v in line.items() if k == "step" or k.startswith("eval")} for line in lines]
        run.note({"evaluations": [line for line in evaluated if len(line) > 1], "last": (lines or [None])[-1]})
    return {}


CHECKS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "environment": environment,
    "kernels": kernels,
    "layer_specs": layer_specs,
    "fp8": partial(trial, "fp8"),
    "recompute": partial(trial, "recompute"),
    "offload": partial(trial, "offload"),
    "checkpoint": partial(trial, "checkpoint"),
    "overlap": overlap,
    "planned": partial(trial, "planned_memory"),
    "embedded": partial(trial, "embedded"),
    "divergence": divergence,
    "step": step,
    "sglang": sglang,
    "run": train,
    "learning": learning,
}


def _trial(run: Run, name: str, model: Path, *sizes: str, ranks: int = 1) -> dict[str, Any]:
    """Run a trial; note each setting's result as it comes. It passes when no setting ended in an error."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    failed: list[str] = []

    def note(line: str) -> None:
        if (result := _result(line)) is not None:
            run.note(result)
            failed.extend(name for name, value in result.items() if isinstance(value, dict) and value.get("error"))

    arguments = [*launch, _tool("gpu_trials"), name, "--model", str(model), "--device", run.device, *sizes]
    _python(run, arguments, on_line=note)
    return {"ok": False, "error": f"in {', '.join(failed)}"} if failed else {}


def _result(line: str) -> dict[str, Any] | None:
    """Return the result of a trial that a line holds; None for what packages print at their import."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _metrics(output: Path) -> list[dict[str, Any]]:
    """Return the metrics of the steps that a run has taken; none when it has not begun."""
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _random_model(run: Run) -> Path:
    """Write a random model; on a GPU with half a billion weights, so that products take realistic time."""
    path = run.folder / "random-model"
    if path.exists():
        return path
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, layers, heads, vocab = (2048, 8, 16, 32000) if run.on_gpu else (64, 2, 4, 300)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=vocab,
        max_position_embeddings=4096,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def _tiny(run: Run) -> Path:
    """Write a model with a character tokenizer; its heads have 64 channels, which every attention kernel supports."""
    path = run.folder / "tiny"
    if not path.exists():
        _python(run, ["-m", "megatron_hdpo", "make-tiny-model", str(path), "--hidden", "256", "--heads", "4"])
    return path


def _tool(name: str) -> str:
    return str(ROOT / "tools" / f"{name}.py")


def _python(
    run: Run, arguments: list[str], seconds: float = 300.0, on_line: Callable[[str], None] = lambda line: None
) -> None:
    """Run Python for at most `seconds`, and not beyond the deadline. Raises PartError."""
    left = run.deadline - time.monotonic()
    if left <= 0:
        raise PartError("no time was left for it")
    run_python(arguments, ROOT, min(seconds, left), on_line)


if __name__ == "__main__":
    main()
