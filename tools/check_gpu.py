"""Everything that only a GPU can tell, in one run of a few minutes, into one JSON file.

    python tools/check_gpu.py --out benchmarks/gpu.json

Checks, each of which is recorded with its numbers or its error and does not stop the others:
  environment   versions, GPU, what is installed
  layer_specs   Transformer Engine's spec against plain torch: log-probs and gradients of a model with the same weights
  divergence    Triton kernels against the torch reference and against the copy bandwidth (tools/bench_divergence.py)
  step          HDPO step against GRPO step, packed against padded, against transformers (tools/bench_step.py)
  sglang        an SGLang server on the GPU: weights by CUDA IPC, NCCL and disk, each through the gate, and its speed
                (tools/bench_rollout.py); reported as not installed where SGLang is not in this environment
  run           a whole HDPO run on the GPU: engine, self-test, training, checkpoint, export (examples/digit_sums)

It needs the package's core dependencies; layer_specs also needs transformer-engine. No network.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # it runs from a plain copy of the repository, too


def main() -> None:
    """The command line; exits with 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--device", default="cuda", help="cpu tries the script itself, without what needs a GPU")
    parser.add_argument("--model", type=Path, help="Hugging Face folder for the step benchmark; default: a tiny model")
    parser.add_argument("--only", nargs="*", choices=CHECKS, help="run only these checks")
    arguments = parser.parse_args()
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
    """What the machine is."""
    from megatron_hdpo.doctor import findings

    found = list(findings())
    return {"ok": all(fine for _, fine in found), "findings": [line for line, _ in found]}


def layer_specs(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Differences between the two specs, in float32 and bfloat16, over packed sequences of different lengths."""
    return json.loads(_run([sys.argv[0], "--compare-specs", arguments.device, str(_tiny(folder, hidden=256, heads=4))]))


def divergence(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The table of tools/bench_divergence.py."""
    out = folder / "divergence.json"
    sizes = ["--tokens", "8192", "--vocab", "151936", "--dtype", "bfloat16"] if arguments.device == "cuda" else []
    tool = str(ROOT / "tools" / "bench_divergence.py")
    _run([tool, "--device", arguments.device, "--json", str(out), *sizes])
    return {"table": json.loads(out.read_text())}


def step(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The table of tools/bench_step.py."""
    out = folder / "step.json"
    model = arguments.model or _tiny(folder, hidden=512, heads=8, layers=8)
    tool = str(ROOT / "tools" / "bench_step.py")
    _run([tool, "--model", str(model), "--device", arguments.device, "--json", str(out)])
    return {"table": json.loads(out.read_text())}


def sglang(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The table of tools/bench_rollout.py, whose pushes by each path must pass the gate."""
    if importlib.util.find_spec("sglang") is None:
        return {"installed": False}
    out = folder / "rollout.json"
    _run([str(ROOT / "tools" / "bench_rollout.py"), "--device", arguments.device, "--out", str(out)])
    return {"installed": True, "table": json.loads(out.read_text())}


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Last line of the metrics of a short run of examples/digit_sums."""
    overrides = [f"model.path={_tiny(folder)}", f"output={folder / 'run'}", f"device={arguments.device}"]
    overrides += ["train.steps=5", "warmup.steps=50", "evaluation.every=null"]
    _run(["-m", "megatron_hdpo", "train", str(ROOT / "examples" / "digit_sums" / "hdpo.yaml"), *overrides])
    return {"metrics": json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])}


CHECKS: dict[str, Callable[..., dict]] = {
    "environment": environment,
    "layer_specs": layer_specs,
    "divergence": divergence,
    "step": step,
    "sglang": sglang,
    "run": run,
}


def compare_specs(device: str, model_path: str) -> dict[str, Any]:
    """Score and differentiate the same examples under both specs (in this process)."""
    import numpy as np

    from megatron_hdpo.model.architecture import read_architecture
    from megatron_hdpo.model.build import build_model, wrap_data_parallel
    from megatron_hdpo.model.config import ModelConfig
    from megatron_hdpo.model.policy import Policy
    from megatron_hdpo.objectives.interface import Example, LossSpec, Scoring, SurrogateConfig
    from megatron_hdpo.parallel.context import start, stop
    from megatron_hdpo.parallel.layout import ParallelConfig
    from megatron_hdpo.weights.load import load_hf

    context = start(ParallelConfig(), device)
    architecture = read_architecture(model_path)
    rng = np.random.default_rng(0)
    examples, scorings = [], []
    for i in range(8):
        prompt, response = (rng.integers(0, architecture.vocab_size, n).astype(np.int32) for n in (20 + i, 40 - 3 * i))
        ones = np.ones(len(response), np.float32)
        examples.append(Example(prompt, response, ones * np.float32(rng.normal()), ones, float(len(response))))
        scorings.append(Scoring((i, "student", 0, "check"), prompt, response, "policy"))
    results: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        outputs = []
        for spec in ("torch", "transformer_engine"):
            config = ModelConfig(path=model_path, dtype=dtype, spec=spec)
            model = build_model(architecture, context, config)
            load_hf(model, architecture, context, model_path)
            policy = Policy(architecture, context, wrap_data_parallel(model, context), 1024)
            scores = policy.score(scorings)
            logprobs = np.concatenate([scores[scoring.key].logprobs_T for scoring in scorings])
            policy.accumulate_gradients(examples, LossSpec(SurrogateConfig(), None, 1.0))
            outputs.append((logprobs, _gradients(policy)))
        (plain, plain_grads), (fused, fused_grads) = outputs
        errors = {
            name: float((fused_grads[name] - grad).norm() / grad.norm().clamp(min=1e-12))
            for name, grad in plain_grads.items()
        }
        results[dtype] = {
            "max_logprob_difference": float(np.abs(plain - fused).max()),
            "mean_logprob_difference": float(np.abs(plain - fused).mean()),
            "largest_relative_gradient_error": max(errors.values()),
            "in": max(errors, key=lambda name: errors[name]),
        }
    stop()
    return results


def _gradients(policy: Any) -> dict[str, Any]:
    """Gradients by Hugging Face name, as the two specs name parameters differently. Overwrites the weights."""
    import torch

    from megatron_hdpo.weights.stream import stream_hf

    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.copy_(parameter.main_grad)
    stream = stream_hf(policy.model, policy.architecture, policy.context)
    return {name: tensor.double().cpu() for name, tensor in stream}


def _tiny(folder: Path, **sizes: int) -> Path:
    path = folder / ("tiny-" + "-".join(f"{k}{v}" for k, v in sizes.items()))
    if not path.exists():
        flags = [part for key, value in sizes.items() for part in (f"--{key}", str(value))]
        _run([str(ROOT / "tools" / "make_tiny_model.py"), str(path), *flags])
    return path


def _run(arguments: list[str]) -> str:
    """Run Python in the root of the repository; the end of its output in the error when it fails."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        raise RuntimeError(f"{arguments} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


if __name__ == "__main__":
    if "--compare-specs" in sys.argv:
        print(json.dumps(compare_specs(*sys.argv[2:4])))
    else:
        main()
