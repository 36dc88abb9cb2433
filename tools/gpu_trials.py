"""Run a trial of `tools/check_gpu.py` that needs its own process; print a line of JSON for each setting, as it ends.

    python tools/gpu_trials.py fp8 --model FOLDER --device cuda
    python -m torch.distributed.run --standalone --nproc-per-node 2 tools/gpu_trials.py overlap --model FOLDER

A trial builds the same policy under several settings, gives each the same work, and reports what differs: values,
seconds, and bytes of GPU memory. On a CPU it reports null for memory, and "refused" for what needs a GPU. A setting
that fails reports its error; on several ranks it ends the trial, since the others would wait for the rank that failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import _environment  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from a plain copy of the repository, too

import _gpu_kernels
import numpy as np
import torch
from megatron.core import parallel_state

from megatron_hdpo.checkpoint.store import CheckpointStore
from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.costs.memory import kept_between_steps, resident, training
from megatron_hdpo.costs.micro_batch_shape import PackedShape, Repeated
from megatron_hdpo.model.architecture import read_architecture
from megatron_hdpo.model.build import build_model, wrap_data_parallel
from megatron_hdpo.model.config import ModelConfig, OptimizerConfig, choose_spec
from megatron_hdpo.model.fp8_rules import precision_errors, runtime_error
from megatron_hdpo.model.optimizer import build_optimizer
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.parallel.context import ParallelContext, start, stop
from megatron_hdpo.parallel.layout import ParallelConfig
from megatron_hdpo.rollout.config import EmbeddedEngineConfig
from megatron_hdpo.rollout.embedded import EmbeddedEngine
from megatron_hdpo.types.learning import Example, LossSpec, Scoring, SurrogateConfig
from megatron_hdpo.types.rollouts import GenerationRequest, SamplingParams
from megatron_hdpo.weights.load import load_hf
from megatron_hdpo.weights.stream import stream_hf

Results = Iterator[tuple[str, Any]]
"""Names and results of a trial's settings, each as soon as it is known."""

SPEC = LossSpec(SurrogateConfig(), None, 1.0)
FP8_RECIPES = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "core_attn": {"recompute": "selective", "recompute_modules": ["core_attn"]},
    "mlp": {"recompute": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute": "full"},
}


@dataclass(frozen=True)
class Work:
    """Work that every setting of a trial gets.

    prompt, response: lengths in tokens. micro_batches: number of micro-batches, of micro_batch_tokens each.
    """

    model: Path
    dtype: str = "bfloat16"
    prompt: int = 128
    response: int = 384
    micro_batch_tokens: int = 8192
    micro_batches: int = 2
    steps: int = 50
    lr: float = 1e-5

    def examples(self, seed: int = 0) -> list[Example]:
        """Return examples of random tokens, all with weight 1.

        Their loss is the negative log-likelihood, which 50 steps can lower.
        """
        rng = np.random.default_rng(seed)
        vocab = read_architecture(self.model).vocab_size
        ones = np.ones(self.response, np.float32)
        count = self.micro_batches * (self.micro_batch_tokens // (self.prompt + self.response))
        return [
            Example(
                rng.integers(0, vocab, self.prompt).astype(np.int32),
                rng.integers(0, vocab, self.response).astype(np.int32),
                ones,
                ones,
                float(self.response),
            )
            for _ in range(count)
        ]


@contextmanager
def joined(device: str, **layout: Any) -> Iterator[ParallelContext]:
    """Create Megatron's groups of a layout, and destroy them afterwards; torch's process group stays."""
    context = start(ParallelConfig(**layout), device)
    try:
        yield context
    finally:
        parallel_state.destroy_model_parallel()


def build(work: Work, context: ParallelContext, offload: float = 0.0, **model: Any) -> Policy:
    """Build a policy that trains, from the checkpoint.

    Raises ValueError or ModelError when this machine cannot run its precision.
    """
    architecture = read_architecture(work.model)
    config = ModelConfig(**({"path": str(work.model), "dtype": work.dtype} | model))
    for reason in precision_errors(config, context.layout, architecture):
        raise ValueError(reason)
    built = build_model(architecture, context, config)
    load_hf(built, architecture, context, work.model)
    ddp = wrap_data_parallel(built, context)
    optimizer = build_optimizer(OptimizerConfig(lr=work.lr, offload=offload), ddp, context, 1000)
    return Policy(architecture, context, ddp, work.micro_batch_tokens, *optimizer)


def fp8(work: Work, device: str) -> Results:
    """Compare the loss of `steps` updates on the same examples in each FP8 recipe with that in bfloat16.

    Reports the largest and the mean relative difference of the curves, seconds per step after the first ten, and peak
    memory.
    """
    settings: dict[str, dict[str, Any]] = {"bfloat16": {}}
    settings |= {recipe: {"fp8": kind, "fp8_recipe": recipe} for recipe, kind in FP8_RECIPES.items()}
    plain: list[float] | None = None
    with joined(device) as context:
        for name, model in settings.items():
            result = _freed(partial(_fp8_curve, work, context, model))
            if name == "bfloat16":
                plain = result.get("losses")
            yield name, result | _apart(result.get("losses"), plain)


def _fp8_curve(work: Work, context: ParallelContext, model: dict[str, Any]) -> dict[str, Any]:
    config = ModelConfig(path="", **model)
    if reason := runtime_error(config, choose_spec(config, context.device), context.device):
        return {"refused": reason}
    return _curve(work, build(work, context, **model))


def _apart(losses: list[float] | None, plain: list[float] | None) -> dict[str, float | None]:
    """Return relative differences of a curve from the plain one; nothing without a curve, None without a plain one."""
    if losses is None:
        return {}
    if plain is None:
        return {"largest_difference": None, "mean_difference": None}
    difference = np.abs(np.array(losses) - plain) / np.abs(plain)
    return {"largest_difference": float(difference.max()), "mean_difference": float(difference.mean())}


def _curve(work: Work, policy: Policy) -> dict[str, Any]:
    examples, losses, seconds = work.examples(), [], []
    for _ in range(work.steps):
        took, metrics = _timed(lambda: policy.update(examples, SPEC))
        losses.append(metrics["train/nll"])
        seconds.append(took)
    return {"losses": losses, "step_s": float(np.median(seconds[min(10, work.steps - 1) :])), "peak_gib": _peak()}


def recompute(work: Work, device: str) -> Results:
    """Measure peak memory and seconds of forward and backward passes in each recompute mode.

    Also reports the largest difference of any gradient from that without recompute, relative to its norm.
    """
    with joined(device) as context:
        yield from _compare(
            {name: partial(build, work, context, **model) for name, model in RECOMPUTE.items()},
            lambda policy: policy.accumulate_gradients(work.examples(), SPEC),
            _gradients,
        )


def offload(work: Work, device: str) -> Results:
    """Measure peak memory and seconds of an update with 0, half and all of the optimizer on the host.

    Also reports how far the weights after three updates are from those with the optimizer on the device.
    """
    with joined(device) as context:
        if context.device.type != "cuda":
            yield "refused", "on a CPU the optimizer is in host memory already"
            return
        yield from _compare(
            {str(share): partial(build, work, context, share) for share in (0.0, 0.5, 1.0)},
            lambda policy: policy.update(work.examples(), SPEC),
            _weights,
        )


def checkpoint(work: Work, device: str) -> Results:
    """Measure the seconds to write and read a checkpoint tied to its layout, and a reshardable one.

    With the optimizer on the device and half of it on the host. Also reports how far the weights after three further
    updates are from those of the policy that wrote the checkpoint.
    """
    examples = work.examples()

    def run(store: CheckpointStore, share: float) -> dict[str, Any]:
        save_s, saved, expected = write(store, share)
        fresh = build(work, context, share)
        load_s, _ = _timed(lambda: store.load(saved, fresh))
        go_on(fresh)
        return {"save_s": save_s, "load_s": load_s, "largest_difference": _difference(_weights(fresh), expected)}

    def write(store: CheckpointStore, share: float) -> tuple[float, Path, dict[str, torch.Tensor]]:
        policy = build(work, context, share)
        policy.update(examples, SPEC)
        save_s, saved = _timed(lambda: store.save(1, policy))
        go_on(policy)
        return save_s, saved, _weights(policy)

    def go_on(policy: Policy) -> None:
        for _ in range(3):  # a step count that stands still shows from the second one on
            policy.update(examples, SPEC)

    with joined(device) as context, TemporaryDirectory() as folder:
        for share, reshardable in product((0.0, 0.5), (False, True)):
            name = ("reshardable" if reshardable else "tied") + (", half offloaded" if share else "")
            if share and context.device.type != "cuda":
                yield name, {"refused": "on a CPU the optimizer is in host memory already"}
                continue
            yield name, _freed(partial(run, CheckpointStore(Path(folder) / name, context, 1, reshardable), share))


def overlap(work: Work, device: str) -> Results:
    """Measure the seconds of an update with and without overlap over the replicas (one per rank).

    Also reports how far the weights are apart after three updates. Every replica has its own examples.
    """
    kept: dict[str, Any] = {}
    for name, switch in (("off", False), ("on", True)):
        with joined(device, overlap=switch) as context:
            examples = work.examples(context.dp_rank)
            step = lambda policy, examples=examples: policy.update(examples, SPEC)  # noqa: E731
            yield from _compare({name: partial(build, work, context)}, step, _weights, "off", kept)
            yield "replicas", context.dp_size


def _compare(
    settings: dict[str, Callable[[], Policy]],
    step: Callable[[Policy], Any],
    read: Callable[[Policy], dict[str, torch.Tensor]],
    reference: str | None = None,
    kept: dict[str, Any] | None = None,
) -> Results:
    """Run three steps of each setting; yield median seconds, peak memory, and the difference from the reference.

    The difference is that of what `read` returns: the largest, relative to the norm of each tensor; None when the
    reference (default: the first setting) failed. kept: what the reference read, from an earlier call.
    """
    kept = {} if kept is None else kept
    reference = reference or next(iter(settings))

    def run(name: str, make: Callable[[], Policy]) -> dict[str, Any]:
        policy = make()
        seconds = [_timed(lambda: step(policy))[0] for _ in range(3)]
        peak, values = _peak(), read(policy)
        if name == reference:
            kept[reference] = values
        difference = _difference(values, kept[reference]) if reference in kept else None
        return {"seconds": float(np.median(seconds)), "peak_gib": peak, "largest_difference": difference}

    for name, make in settings.items():
        yield name, _freed(partial(run, name, make))


def _difference(values: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of any tensor, relative to its norm."""
    return max(float((values[n] - v).norm() / v.norm().clamp(min=1e-12)) for n, v in expected.items())


def _weights(policy: Policy) -> dict[str, torch.Tensor]:
    stream = stream_hf(policy.model, policy.architecture, policy.context)
    return {name: tensor.double().cpu() for name, tensor in stream}


def _gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """Return gradients by Hugging Face name, because the specs name parameters differently. Overwrites the weights."""
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.copy_(parameter.main_grad)
    return _weights(policy)


def specs(work: Work, device: str) -> Results:
    """Compare Transformer Engine's spec with plain torch in both dtypes.

    Reports differences of log-probs of sequences of different lengths, and the largest relative error of a gradient.
    """
    rng = np.random.default_rng(0)
    vocab = read_architecture(work.model).vocab_size
    examples, scorings = [], []
    for i in range(8):
        prompt, response = (rng.integers(0, vocab, n).astype(np.int32) for n in (20 + i, 40 - 3 * i))
        ones = np.ones(len(response), np.float32)
        examples.append(Example(prompt, response, ones * np.float32(rng.normal()), ones, float(len(response))))
        scorings.append(Scoring((i, "student", 0, "check"), prompt, response, "policy"))

    def outputs(context: ParallelContext, spec: str, dtype: str) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        policy = build(work, context, spec=spec, dtype=dtype)
        scores = policy.score(scorings)
        policy.accumulate_gradients(examples, SPEC)
        return np.concatenate([scores[scoring.key].logprobs_T for scoring in scorings]), _gradients(policy)

    def compare(context: ParallelContext, dtype: str) -> dict[str, Any]:
        plain, plain_grads = outputs(context, "torch", dtype)
        fused, fused_grads = outputs(context, "transformer_engine", dtype)
        errors = {
            name: float((fused_grads[name] - grad).norm() / grad.norm().clamp(min=1e-12))
            for name, grad in plain_grads.items()
        }
        return {
            "max_logprob_difference": float(np.abs(plain - fused).max()),
            "mean_logprob_difference": float(np.abs(plain - fused).mean()),
            "largest_relative_gradient_error": max(errors.values()),
            "in": max(errors, key=lambda name: errors[name]),
        }

    with joined(device) as context:
        for dtype in ("float32", "bfloat16"):
            yield dtype, _freed(partial(compare, context, dtype))


def planned_memory(work: Work, device: str) -> Results:
    """Compare the planner's bytes of an update with what torch allocated, without and with full recompute."""
    with joined(device) as context:
        spec = choose_spec(ModelConfig(path=""), context.device)
        for name in ("none", "full"):
            yield name, _freed(partial(_planned, work, context, spec, name))


def _planned(work: Work, context: ParallelContext, spec: Any, mode: str) -> dict[str, Any]:
    policy = build(work, context, **RECOMPUTE[mode])
    policy.update(work.examples(), SPEC)
    layout = Layout(recompute=mode == "full", spec=spec, value_bytes=2 if work.dtype == "bfloat16" else 4)
    sequences = work.micro_batch_tokens // (work.prompt + work.response)
    shape = PackedShape(
        sequences * (work.prompt + work.response), work.prompt + work.response, sequences * work.response
    )
    kinds = resident(policy.architecture, layout, 0) | kept_between_steps(policy.architecture, layout, 0, shape.rows)
    kinds |= training(policy.architecture, layout, 0, Repeated(shape, work.micro_batches), policy.head_chunk)
    kinds.pop("framework", None)  # CUDA's context and libraries, which torch does not count
    planned = sum(kinds.values()) / 2**30
    measured = _peak()
    return {
        "planned_gib": planned,
        "measured_gib": measured,
        "relative_error": None if measured is None else planned / measured - 1,
        "kinds_gib": {name: value / 2**30 for name, value in kinds.items()},
    }


def embedded(work: Work, device: str) -> Results:
    """Measure the embedded engine's tokens per second, and the difference of its log-probs from the trainer's."""
    with joined(device) as context:
        policy = build(work, context)
        engine = EmbeddedEngine(work.model, EmbeddedEngineConfig(dtype=work.dtype), context.device)
        engine.update_weights(stream_hf(policy.model, policy.architecture, context), version=0)
        prompts = [e.prompt_ids for e in work.examples()[:8]]
        sampling = SamplingParams(work.response, n=8)
        requests = [GenerationRequest(str(i), ids, sampling, seed=i) for i, ids in enumerate(prompts)]
        seconds, results = _timed(lambda: engine.submit(requests) or list(engine.results()))
        if failed := [error for result in results for error in result.errors]:
            raise RuntimeError(failed[0])
        samples = [(int(r.request_id), s, c) for r in results for s, c in enumerate(r.completions)]
        scorings = [Scoring((g, "student", s, "check"), prompts[g], c.token_ids, "policy") for g, s, c in samples]
        scores = policy.score(scorings)
        off = [np.abs(scores[q.key].logprobs_T - c.logprobs) for q, (_, _, c) in zip(scorings, samples, strict=True)]
        differences = np.concatenate(off)
        yield "tokens", len(differences)
        yield "tokens_per_s", len(differences) / seconds
        yield "mean_logprob_difference", float(differences.mean())
        yield "max_logprob_difference", float(differences.max())


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    _wait()
    began = time.perf_counter()
    result = work()
    _wait()
    return time.perf_counter() - began, result


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak() -> float | None:
    """Return the most GiB that torch has allocated since the last `_freed` began."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def _freed(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of the work, begun with an empty GPU cache.

    On one rank an error becomes a result, so that the next setting runs.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        return work()
    except Exception as error:
        if torch.distributed.get_world_size() > 1:
            raise
        return {"error": f"{type(error).__name__}: {error}"}


def kernels(work: Work, device: str) -> Results:
    """Compare the kernels that only a GPU runs with float64 on the host."""
    with joined(device):
        for name, compare in _gpu_kernels.settings(device).items():
            yield name, _freed(compare)


TRIALS: dict[str, Callable[[Work, str], Results]] = {
    "kernels": kernels,
    "specs": specs,
    "fp8": fp8,
    "recompute": recompute,
    "offload": offload,
    "checkpoint": checkpoint,
    "overlap": overlap,
    "planned_memory": planned_memory,
    "embedded": embedded,
}


def main() -> None:
    """Run the trial of the command line; print its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=TRIALS)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face checkpoint folder")
    parser.add_argument("--device", default="cuda")
    for name, default in (("prompt", 128), ("response", 384), ("micro-batch-tokens", 8192), ("steps", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("prompt", "response", "micro_batch_tokens", "steps")}
    for name, result in TRIALS[arguments.trial](Work(arguments.model, **sizes), arguments.device):
        if torch.distributed.get_rank() == 0:
            print(json.dumps({name: result}), flush=True)
    stop()


if __name__ == "__main__":
    main()
