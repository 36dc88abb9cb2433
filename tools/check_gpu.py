"""Run every check that needs a GPU, in a few minutes, and write the results into one JSON file.

    python tools/check_gpu.py --out benchmarks/gpu.json --model runs/smollm2-135m-instruct --problems gsm8k_train.jsonl

Checks. Each is recorded with its numbers or its error, is bounded in time, and does not stop the others:
  environment   versions, GPU, what is installed
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
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _environment  # noqa: F401
import torch

# Seconds of the training side of an HDPO step, divided by those of a GRPO step on the same rollouts.
STEP_TARGETS = {"HDPO, teacher from the rollout": 1.10, "HDPO, teacher from the trainer": 1.25}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # it runs from a plain copy of the repository, too


def main() -> None:
    """Run the checks of the command line; exit with 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--device", default="cuda", help="cpu: only to test this script, without what needs a GPU")
    parser.add_argument("--model", type=Path, help="Hugging Face checkpoint folder; default: random weights")
    parser.add_argument("--problems", type=Path, help="JSON lines to learn from, such as GSM8K's")
    parser.add_argument("--only", nargs="*", choices=CHECKS, help="run only these checks")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("check_gpu: torch finds no GPU here; `megatron_hdpo doctor` says more, --device cpu tests the script")
    if arguments.model is not None:
        arguments.model = arguments.model.resolve()  # parts run in the root of the repository
    results: dict[str, Any] = {"command": sys.argv}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only or CHECKS:
            results[name] = _attempt(CHECKS[name], arguments, Path(folder))
            print(
                f"{name}: {'ok' if results[name]['ok'] else 'FAILED'} in {results[name]['seconds']:.0f} s", flush=True
            )
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=1))
    sys.exit(0 if all(results[name]["ok"] for name in arguments.only or CHECKS) else 1)


def _attempt(check: Callable[..., dict], arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        result: dict[str, Any] = {"ok": True, **check(arguments, folder)}
    except Exception:
        result = {"ok": False, "error": traceback.format_exc(limit=6)}
    return result | {"seconds": time.perf_counter() - began}


def environment(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Report the findings of the doctor on this machine."""
    from megatron_hdpo.health.doctor import findings

    found = list(findings())
    return {"ok": all(fine is not False for _, fine in found), "findings": [line for line, _ in found]}


def layer_specs(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compare the two specs in float32 and bfloat16, over packed sequences of different lengths."""
    return _trial("specs", arguments.device, _tiny(folder, hidden=256, heads=4))


def trial(name: str, arguments: argparse.Namespace, folder: Path, ranks: int = 1) -> dict[str, Any]:
    """Run a trial of tools/gpu_trials.py; it passes when no setting ended in an error."""
    model = arguments.model or _random_model(folder, arguments.device)
    small = [] if arguments.device == "cuda" else ["--prompt", "8", "--response", "8", "--micro-batch-tokens", "32"]
    small += [] if arguments.device == "cuda" else ["--steps", "3"]
    settings = _trial(name, arguments.device, model, *small, ranks=ranks)
    failed = [key for key, value in settings.items() if isinstance(value, dict) and "error" in value and value["error"]]
    return {"ok": name == "planned_memory" or not failed, **settings}


def overlap(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the overlap trial over every GPU of the machine; with two ranks on a CPU."""
    import torch

    ranks = torch.cuda.device_count() if arguments.device == "cuda" else 2
    return trial("overlap", arguments, folder, ranks)


def divergence(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the table of tools/bench_divergence.py."""
    out = folder / "divergence.json"
    sizes = ["--tokens", "8192", "--vocab", "151936", "--dtype", "bfloat16"] if arguments.device == "cuda" else []
    tool = str(ROOT / "tools" / "bench_divergence.py")
    _run([tool, "--device", arguments.device, "--json", str(out), *sizes])
    return {"table": json.loads(out.read_text())}


def step(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the table of tools/bench_step.py, and its ratios to GRPO with their targets."""
    out = folder / "step.json"
    model = arguments.model or _random_model(folder, arguments.device)
    tool = str(ROOT / "tools" / "bench_step.py")
    sizes = ["--rounds", "1", "--prompts", "3", "--samples", "2", "--survivors", "1", "--response-tokens", "8"]
    if arguments.device == "cuda":
        sizes = ["--prompts", "24", "--prompt-tokens", "256", "--response-tokens", "1024"]
        sizes += ["--micro-batch-tokens", "16384"]
    _run([tool, "--model", str(model), "--device", arguments.device, "--json", str(out), *sizes])
    table = json.loads(out.read_text())
    ratios = {row["what"]: row["ratio"] for row in table["rows"]}
    targets = {
        what: {"ratio": ratios[what], "target": target, "met": ratios[what] <= target}
        for what, target in STEP_TARGETS.items()
    }
    return {"against GRPO": targets, "table": table}


def sglang(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the table of tools/bench_rollout.py; the pushes of each path must pass the gate."""
    if importlib.util.find_spec("sglang") is None:
        return {"installed": False}
    out = folder / "rollout.json"
    _run([str(ROOT / "tools" / "bench_rollout.py"), "--device", arguments.device, "--out", str(out)])
    return {"installed": True, "table": json.loads(out.read_text())}


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train examples/digit_sums for a few steps; return the last line of its metrics."""
    overrides = [f"model.path={_tiny(folder)}", f"output={folder / 'run'}", f"device={arguments.device}"]
    overrides += ["train.steps=5", "warmup.steps=50", "evaluation.every=null"]
    _run(["-m", "megatron_hdpo", "train", str(ROOT / "examples" / "digit_sums" / "hdpo.yaml"), *overrides])
    return {"metrics": json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])}


def learning(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train the quickstart's recipe for a few steps, on --problems if given; return its evaluations."""
    if arguments.model is None:
        return {"skipped": "no --model: there is nothing to teach"}
    out = folder / "learning"
    overrides = [f"model.path={arguments.model}", f"output={out}", f"device={arguments.device}", "parallel.pipeline=1"]
    overrides += ["threads_per_rank=null", "rollout.max_new_tokens=192", "train.micro_batch_tokens=8192"]
    overrides += ["rollout.prompts_per_step=32", "rollout.embedded.max_batch_sequences=256", "train.steps=20"]
    overrides += ["warmup.examples_per_step=64", "evaluation.max_new_tokens=192", "model.max_sequence=1024"]
    if arguments.problems is not None:
        rows = arguments.problems.read_text(encoding="utf-8").splitlines()
        for name, part in (("train", rows[:-64]), ("evaluation", rows[-64:])):
            path = folder / f"{name}.jsonl"
            path.write_text("\n".join(part) + "\n", encoding="utf-8")
            overrides.append(f"data.{name}=[{{kind: jsonl, name: {name}, path: {path}}}]")
        overrides += ["data.prompts.max_prompt_tokens=320", "data.prompts.max_privileged_tokens=640"]
    _run(
        ["-m", "megatron_hdpo", "train", str(ROOT / "examples" / "quickstart" / "hdpo.yaml"), *overrides], timeout=900.0
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluated = [{k: v for k, v in line.items() if k == "step" or k.startswith("eval")} for line in lines]
    return {"evaluations": [line for line in evaluated if len(line) > 1], "last": lines[-1]}


CHECKS: dict[str, Callable[..., dict]] = {
    "environment": environment,
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
    "run": run,
    "learning": learning,
}


def _trial(name: str, device: str, model: Path, *sizes: str, ranks: int = 1) -> dict[str, Any]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    tool = str(ROOT / "tools" / "gpu_trials.py")
    return json.loads(_run([*launch, tool, name, "--model", str(model), "--device", device, *sizes]))


def _random_model(folder: Path, device: str) -> Path:
    """Write a random model; on a GPU with half a billion weights, so that products take realistic time."""
    path = folder / "random-model"
    if path.exists():
        return path
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, layers, heads, vocab = (2048, 8, 16, 32000) if device == "cuda" else (64, 2, 4, 300)
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


def _tiny(folder: Path, **sizes: int) -> Path:
    path = folder / ("tiny-" + "-".join(f"{k}{v}" for k, v in sizes.items()))
    if not path.exists():
        flags = [part for key, value in sizes.items() for part in (f"--{key}", str(value))]
        _run(["-m", "megatron_hdpo", "make-tiny-model", str(path), *flags])
    return path


def _run(arguments: list[str], timeout: float = 300.0) -> str:
    """Run Python in the root of the repository, for at most `timeout` seconds; return its last line of output.

    Raises RuntimeError with the end of the output when it fails.
    """
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    if done.returncode:
        raise RuntimeError(f"{arguments} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


if __name__ == "__main__":
    main()
