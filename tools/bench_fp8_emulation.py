"""Measure what FP8 products change, emulated on this machine: log-probs, divergences, gradients, and what is learnt.

    python tools/bench_fp8_emulation.py effect --model runs/smollm2-135m-instruct --json benchmarks/fp8_emulation.json
    python tools/bench_fp8_emulation.py learning --seeds 0 1 2 --json benchmarks/fp8_emulation.json

effect: on a pretrained model. The embedded engine continues paragraphs of this repository's documents in bfloat16; then
a policy of each precision scores the same tokens and computes two gradients: a policy gradient, and that of the JSD to
a teacher that saw the paragraph before. Everything is compared with the policy in float32.

learning: examples/quickstart/sums.yaml on a model of 0.2 million parameters, from the same warmed-up weights with and
without each recipe.

Rows are added to the JSON file as they come; those of the same setting (and seed) are replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _environment  # noqa: F401
import numpy as np
import torch
from _python_parts import run_python
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from megatron_hdpo.model.architecture import read_architecture
from megatron_hdpo.model.build import build_model, wrap_data_parallel
from megatron_hdpo.model.config import ModelConfig
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.parallel.context import ParallelContext, start, stop
from megatron_hdpo.parallel.layout import ParallelConfig
from megatron_hdpo.rollout.config import EmbeddedEngineConfig
from megatron_hdpo.rollout.embedded import EmbeddedEngine
from megatron_hdpo.tracking.metrics import read_metrics
from megatron_hdpo.types.learning import DivergenceConfig, Example, LossSpec, Scoring, SurrogateConfig
from megatron_hdpo.types.rollouts import GenerationRequest, SamplingParams, TopKArrays
from megatron_hdpo.weights.load import load_hf
from megatron_hdpo.weights.stream import stream_hf

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("docs/methods.md", "docs/parallelism.md", "docs/teachers.md", "docs/divergence.md")
RECIPES = ("tensorwise", "blockwise", "mxfp8")
POLICY_GRADIENT = LossSpec(SurrogateConfig(), None, temperature=1.0)
REFERENCE = "float32"
SETTINGS: dict[str, dict[str, Any]] = {
    REFERENCE: {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    **{f"bfloat16, {recipe}": {"dtype": "bfloat16", "fp8_emulation": recipe} for recipe in RECIPES},
    "bfloat16, tensorwise but 2 + 2 layers": {
        "dtype": "bfloat16",
        "fp8_emulation": "tensorwise",
        "first_last_layers_bf16": (2, 2),
    },
    "float32, tensorwise": {"dtype": "float32", "fp8_emulation": "tensorwise"},
}


def main() -> None:
    """Measure the part of the command line; print its table, and add its rows to the JSON file."""
    options = parse_options()
    rows = []
    for row in effect(options) if options.part == "effect" else learning(options):
        rows.append(row)
        if options.json:
            add_to(options.json, options.part, row)
    print_table(rows)


def add_to(path: Path, part: str, row: dict[str, Any]) -> None:
    """Add a row to its part of the file, in the place of an older one of the same setting."""
    whole = json.loads(path.read_text()) if path.exists() else {"torch": torch.__version__, "cores": os.cpu_count()}
    others = [old for old in whole.get(part, []) if (old["setting"], old["seed"]) != (row["setting"], row["seed"])]
    whole[part] = [*others, row]
    path.write_text(json.dumps(whole, indent=1) + "\n")


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["effect", "learning"])
    parser.add_argument("--json", type=Path, help="file that gets the numbers")
    parser.add_argument("--model", type=Path, help="effect: Hugging Face folder of a pretrained model")
    parser.add_argument("--prompts", type=int, default=16, help="effect: paragraphs that are continued")
    parser.add_argument("--tokens", type=int, default=64, help="effect: of each prompt, and of each continuation")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="effect: rows")
    parser.add_argument("--top-k", type=int, default=64, help="effect: tokens that the JSD compares; the rest is one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="learning")
    parser.add_argument("--steps", type=int, default=40, help="learning: after the warm-up")
    options = parser.parse_args()
    if options.part == "effect" and options.model is None:
        parser.error("effect needs --model: python examples/quickstart/fetch_model.py FOLDER writes one")
    return options


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of equal keys."""
    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "setting" else "right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=200).print(table)


@dataclass(frozen=True)
class Samples:
    """Continuations of prompts, with the engine's log-probs.

    before: the teacher's contexts, one for each. top_k: tokens of a target.
    """

    prompts: list[np.ndarray]
    before: list[np.ndarray]
    responses: list[np.ndarray]
    logprobs: list[np.ndarray]
    top_k: int

    @property
    def distillation(self) -> LossSpec:
        """Return the JSD to a target."""
        divergence = DivergenceConfig(coefficient=1.0, kind="jsd", tail="bucket", top_k=self.top_k)
        return LossSpec(SurrogateConfig(), divergence, temperature=1.0)

    def scorings(self, contexts: Sequence[np.ndarray]) -> list[Scoring]:
        """Return scorings of the responses in these contexts, with the likeliest tokens."""
        pairs = zip(contexts, self.responses, strict=True)
        return [Scoring((i, "student", 0, "bench"), c, r, "policy", self.top_k) for i, (c, r) in enumerate(pairs)]

    def examples(self, targets: Sequence[TopKArrays] | None) -> list[Example]:
        """Return examples that distil targets; without them, a policy gradient with advantages 1 and -1 in turn."""
        return [self._example(i, None if targets is None else targets[i]) for i in range(len(self.responses))]

    def _example(self, index: int, target: TopKArrays | None) -> Example:
        response = self.responses[index]
        ones, count = np.ones(len(response), np.float32), float(len(response))
        if target is None:
            return Example(self.prompts[index], response, ones * (-1) ** index, ones, count)
        nothing = ones * 0
        return Example(
            self.prompts[index],
            response,
            nothing,
            nothing,
            distill_weights_T=ones,
            distill_count=count,
            target=target,
        )


def effect(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each precision: differences from the engine and from float32, and CPU seconds."""
    torch.set_num_threads(1)
    context = start(ParallelConfig(), "cpu")
    samples = sample(options, context)
    first: Measured | None = None
    for name in dict.fromkeys([REFERENCE, *options.settings]):
        settings = SETTINGS[name]
        policy = build(options.model, context, settings)
        if first is None:
            teacher = [score.top for score in policy.score(samples.scorings(samples.before)).values()]
        found = measure(policy, samples, teacher, first)
        first = first or found
        tokens = sum(map(len, samples.responses))
        yield {"setting": name, "seed": 0, "tokens": tokens} | compared(found, first, samples)
        del policy
    stop()


def build(path: Path, context: ParallelContext, settings: dict[str, Any]) -> Policy:
    """Build a policy of this precision from the checkpoint."""
    architecture = read_architecture(path)
    model = build_model(architecture, context, ModelConfig(path=str(path), spec="torch", **settings))
    load_hf(model, architecture, context, path)
    return Policy(architecture, context, wrap_data_parallel(model, context), 2048)


def sample(options: argparse.Namespace, context: ParallelContext) -> Samples:
    """Continue paragraphs with the engine in bfloat16, at temperature 1."""
    tokenizer, n = AutoTokenizer.from_pretrained(options.model), options.tokens
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS)
    paragraphs = [np.array(tokenizer(part).input_ids, np.int32) for part in text.split("\n\n") if len(part) > 8 * n]
    parts = [(ids[:n], ids[n : 2 * n]) for ids in paragraphs if len(ids) >= 2 * n][: options.prompts]
    prompts, before = [second for _, second in parts], [np.concatenate(pair) for pair in parts]
    engine = EmbeddedEngine(options.model, EmbeddedEngineConfig(dtype="bfloat16"), context.device)
    policy = build(options.model, context, SETTINGS["bfloat16"])
    engine.update_weights(stream_hf(policy.model, policy.architecture, context), version=0)
    sampling = SamplingParams(n, n=1)
    engine.submit([GenerationRequest(str(i), ids, sampling, seed=i) for i, ids in enumerate(prompts)])
    found = {int(result.request_id): result.completions[0] for result in engine.results() if result is not None}
    ordered = [found[i] for i in range(len(prompts))]
    responses, logprobs = [c.token_ids for c in ordered], [c.logprobs for c in ordered]
    return Samples(prompts, before, responses, logprobs, options.top_k)


@dataclass(frozen=True)
class Measured:
    """Results of one precision. gradients: by loss, then parameter. seconds: of the CPU, by kind of pass."""

    logprobs: np.ndarray
    top: list[TopKArrays]
    divergence: float
    gradients: dict[str, list[torch.Tensor]]
    seconds: dict[str, float]


def measure(policy: Policy, samples: Samples, teacher: list[Any], first: Measured | None) -> Measured:
    """Score the samples and compute both gradients, and the divergence from the first policy."""
    scored_s, scores = timed(lambda: policy.score(samples.scorings(samples.prompts)))
    top = [score.top for score in scores.values() if score.top is not None]
    base = top if first is None else first.top
    divergence = policy.accumulate_gradients(samples.examples(base), samples.distillation)["distill/divergence"]
    trained_s, _ = timed(lambda: policy.accumulate_gradients(samples.examples(None), POLICY_GRADIENT))
    gradients = {"policy_gradient": copied_gradients(policy)}
    policy.accumulate_gradients(samples.examples(teacher), samples.distillation)
    gradients["distillation"] = copied_gradients(policy)
    logprobs = np.concatenate([score.logprobs_T for score in scores.values()])
    return Measured(logprobs, top, divergence, gradients, {"score": scored_s, "train": trained_s})


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return CPU seconds and result."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def copied_gradients(policy: Policy) -> list[torch.Tensor]:
    """Return copies of the gradients of all parameters."""
    return [parameter.main_grad.clone() for parameter in policy.model.parameters()]


def compared(found: Measured, first: Measured, samples: Samples) -> dict[str, float]:
    """Return the row of one precision; the engine's tokens are those of its own distribution."""
    off = found.logprobs - np.concatenate(samples.logprobs)
    row = {
        "engine_mean_nats": float(np.abs(off).mean()),
        "engine_p99_nats": float(np.quantile(np.abs(off), 0.99)),
        "engine_max_nats": float(np.abs(off).max()),
        "mismatch_k3": float((np.exp(off) - 1 - off).mean()),
        "jsd_nats": found.divergence,
    }
    for loss, gradients in found.gradients.items():
        cosine, ratio = alignment(gradients, first.gradients[loss])
        row |= {f"{loss}_cosine": cosine, f"{loss}_norm_ratio": ratio}
    return row | {f"{kind}_cpu_s": seconds for kind, seconds in found.seconds.items()}


def alignment(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Return the cosine of two gradients, and the norm of the first relative to the second."""
    pairs = [(x.double().flatten(), y.double().flatten()) for x, y in zip(a, b, strict=True)]
    dots = [[float(u @ v) for u, v in ((x, y), (x, x), (y, y))] for x, y in pairs]
    both, first, second = (sum(column) for column in zip(*dots, strict=True))
    return both / (first * second) ** 0.5, (first / second) ** 0.5


def learning(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each seed and setting: what is solved after it, and the mismatch while it learnt."""
    settings = {"no FP8": [], **{name: ["model.spec=torch", f"model.fp8_emulation={name}"] for name in RECIPES}}
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            warm = warmed_up(Path(folder), seed)
            for name, overrides in settings.items():
                found = trained(Path(folder), warm, name, seed, options.steps, overrides)
                yield {"setting": name, "seed": seed, "steps": options.steps} | found


def warmed_up(folder: Path, seed: int) -> Path:
    """Write a model that was taught short sums, without FP8."""
    model, output = folder / f"model{seed}", folder / f"warm{seed}"
    sizes = ["--layers", "3", "--hidden", "64", "--ffn", "192", "--seed", str(seed)]
    python("make-tiny-model", str(model), *sizes)
    train(output, seed, f"model.path={model}", "train.steps=0", "evaluation.every=null")
    return output / "hf"


def trained(folder: Path, model: Path, name: str, seed: int, steps: int, overrides: list[str]) -> dict[str, float]:
    """Train from warmed-up weights; return the last evaluation and the mean mismatch and gradient norm."""
    output = folder / f"{name.replace(' ', '-')}{seed}"
    more = [f"model.path={model}", "warmup.kind=none", f"train.steps={steps}", f"evaluation.every={steps}"]
    train(output, seed, *more, "evaluation.before=false", "checkpoint.export=false", *overrides)
    steps_of_run = list(read_metrics(output))
    means = {
        name: statistics.mean(step[f"train/{name}"] for step in steps_of_run if f"train/{name}" in step)
        for name in ("mismatch_k3", "mismatch_abs", "grad_norm")
    }
    last = steps_of_run[-1]
    return {"cliffs_pass_at_8": last["eval/cliffs/pass@8"], "taught_pass_at_1": last["eval/taught/pass@1"]} | means


def train(output: Path, seed: int, *overrides: str) -> None:
    """Run the recipe of the quickstart's first act."""
    common = [f"output={output}", f"seed={seed}", "rollout.save=false", "checkpoint.every=1000"]
    python("train", str(ROOT / "examples" / "quickstart" / "sums.yaml"), *common, *overrides)


def python(*arguments: str) -> None:
    """Run a command of the package; it is stopped after half an hour."""
    run_python(["-m", "megatron_hdpo", *arguments], ROOT, 1800.0, lambda line: None)


if __name__ == "__main__":
    main()
