"""Measure a training step: HDPO against GRPO, packed against padded, and against `transformers`.

    python tools/bench_step.py --model runs/smollm2-135m-instruct --threads 1

The table compares an HDPO step with a GRPO step on the same rollouts, packed with padded micro-batches, and trained
tokens per second with `transformers` training the same model on the same tokens. One rank on the CPU (or one GPU).
Every comparison is made within this run, in turns, and reported as the median over `--rounds`; ratios are medians of
per-round ratios. Rollouts are synthetic tokens in groups; every third group is a cliff with surviving privileged
rollouts. Only the training side is timed: sampling is the same for both methods.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import _environment  # noqa: F401
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from megatron_hdpo.model.architecture import read_architecture
from megatron_hdpo.model.build import build_model, wrap_data_parallel
from megatron_hdpo.model.config import DTYPES, ModelConfig, OptimizerConfig
from megatron_hdpo.model.optimizer import build_optimizer
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig
from megatron_hdpo.objectives.hdpo import HDPO, HDPOConfig
from megatron_hdpo.parallel.context import ParallelContext, start, stop
from megatron_hdpo.parallel.layout import ParallelConfig
from megatron_hdpo.sampling.step_rollouts import on_every_rank
from megatron_hdpo.teachers.teacher import PolicyTeacher
from megatron_hdpo.tracking.console import Console as PhaseConsole
from megatron_hdpo.training.learner import Learner
from megatron_hdpo.types.learning import Example, LossSpec, SurrogateConfig
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, Group, Sample, TopKArrays
from megatron_hdpo.weights.load import load_hf


def main() -> None:
    """Run all comparisons and print the table."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    context = start(ParallelConfig(), arguments.device)
    policy = _policy(arguments, context)
    groups = _groups(policy.architecture.vocab_size, arguments)
    rows = _methods(policy, groups, arguments) + _packing(policy, groups, arguments)
    rows += _against_transformers(policy, groups, arguments)
    _show(rows, arguments)
    stop()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face checkpoint folder")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--samples", type=int, default=8, help="rollouts per prompt")
    parser.add_argument("--survivors", type=int, default=4, help="kept privileged rollouts of a cliff")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument(
        "--response-tokens", type=int, default=64, help="longest; lengths are uniform from a quarter of it"
    )
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    return parser.parse_args()


def _policy(arguments: argparse.Namespace, context: ParallelContext) -> Policy:
    architecture = read_architecture(arguments.model)
    config = ModelConfig(path=str(arguments.model), dtype=arguments.dtype)
    model = build_model(architecture, context, config)
    load_hf(model, architecture, context, arguments.model)
    ddp = wrap_data_parallel(model, context)
    optimizer = build_optimizer(OptimizerConfig(lr=1e-6), ddp, context, 1000)
    return Policy(architecture, context, ddp, arguments.micro_batch_tokens, *optimizer)


def _groups(vocab_size: int, arguments: argparse.Namespace) -> list[Group]:
    rng = np.random.default_rng(0)
    top_k = min(HDPOConfig().distill.top_k, vocab_size)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(0, vocab_size, count).astype(np.int32)

    def sample(reward: float, top: bool) -> Sample:
        length = int(rng.integers(arguments.response_tokens // 4, arguments.response_tokens + 1))
        ids = np.stack([rng.choice(vocab_size, top_k, replace=False) for _ in range(length)]) if top else None
        tops = TopKArrays(ids.astype(np.int32), np.full(ids.shape, -5.0, np.float32)) if ids is not None else None
        versions = np.zeros(length, np.int32)
        return Sample(
            Completion(tokens(length), np.full(length, -10.0, np.float32), "stop", versions, tops), "", reward
        )

    groups = []
    for g in range(arguments.prompts):
        cliff = g % 3 == 0
        samples = [sample(0.0 if cliff else float(s % 2), top=False) for s in range(arguments.samples)]
        group = Group(Problem(f"p/{g}", "p", "", ""), tokens(arguments.prompt_tokens), samples)
        if cliff:
            group.privileged_prompt_ids = tokens(2 * arguments.prompt_tokens)
            group.privileged_samples = [sample(1.0, top=True) for _ in range(arguments.survivors)]
        groups.append(group)
    return groups


def _methods(policy: Policy, groups: list[Group], arguments: argparse.Namespace) -> list[dict]:
    """Measure the training side of a step in seconds, by method and phase."""
    console = PhaseConsole(enabled=False)
    objectives = {
        "GRPO": GRPO(GRPOConfig(), ObjectiveDeps()),
        "HDPO, teacher from the trainer": HDPO(HDPOConfig(), ObjectiveDeps()),
        "HDPO, teacher from the rollout": HDPO(HDPOConfig(logits_from="rollout"), ObjectiveDeps()),
    }
    teacher = PolicyTeacher(policy)
    learners = {name: Learner(policy, objective, teacher, console) for name, objective in objectives.items()}
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in learners}

    def step(name: str) -> float:
        console.timer.metrics()
        seconds = _seconds(lambda: learners[name].learn(on_every_rank(groups), 0))
        phases[name].append(console.timer.metrics())
        return seconds

    times = _rounds({name: (lambda name=name: step(name)) for name in learners}, arguments.rounds)
    rows = _rows("training side of a step", times, baseline="GRPO")
    for row in rows:
        timed = phases[row["what"]][1:]
        row["teacher s"] = statistics.median(m.get("time/teacher_s", 0.0) for m in timed)
        row["update s"] = statistics.median(m["time/train_s"] for m in timed)
    return rows


def _examples(groups: list[Group]) -> list[Example]:
    """Return every student rollout as an example with a gradient at each token."""
    rng = np.random.default_rng(1)
    examples = []
    for group in groups:
        for sample in group.samples:
            ones = np.ones(sample.length, np.float32)
            examples.append(
                Example(
                    group.prompt_ids, sample.completion.token_ids, ones * np.float32(rng.normal()), ones, sample.length
                )
            )
    return examples


def _packing(policy: Policy, groups: list[Group], arguments: argparse.Namespace) -> list[dict]:
    """Compare packed micro-batches with one sequence per micro-batch, padded or not."""
    examples, spec = _examples(groups), LossSpec(SurrogateConfig(), None, 1.0)

    def run(budget: int) -> float:
        policy.micro_batch_tokens = budget
        seconds = _seconds(lambda: policy.accumulate_gradients(examples, spec))
        policy.micro_batch_tokens = arguments.micro_batch_tokens
        return seconds

    longest = max(example.num_tokens for example in examples)
    times = _rounds(
        {
            f"packed to {arguments.micro_batch_tokens} tokens": lambda: run(arguments.micro_batch_tokens),
            "one sequence per micro-batch": lambda: run(longest),
            "padded to the longest": lambda: _seconds(lambda: _padded(policy, examples, spec, arguments)),
        },
        arguments.rounds,
    )
    return _rows("forward and backward", times, baseline="padded to the longest")


def _padded(policy: Policy, examples: list[Example], spec: LossSpec, arguments: argparse.Namespace) -> None:
    """Accumulate gradients of the examples, each prompt extended until all sequences are as long as the longest."""
    longest = max(example.num_tokens for example in examples)
    grown = [
        Example(
            np.resize(e.prompt_ids, longest - len(e.response_ids)).astype(np.int32),
            e.response_ids,
            e.advantages_T,
            e.surrogate_weights_T,
            e.surrogate_count,
        )
        for e in examples
    ]
    policy.accumulate_gradients(grown, spec)


def _against_transformers(policy: Policy, groups: list[Group], arguments: argparse.Namespace) -> list[dict]:
    """Compare forward, backward and AdamW step on the same tokens with a plain `transformers` loop."""
    examples, spec = _examples(groups), LossSpec(SurrogateConfig(), None, 1.0)
    tokens = sum(example.num_tokens for example in examples)
    device = policy.context.device
    plain = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).to(device)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-6)
    times = _rounds(
        {
            "transformers, padded batches": lambda: _seconds(
                lambda: _train_plain(plain, optimizer, examples, arguments.micro_batch_tokens)
            ),
            "megatron_hdpo, packed": lambda: _seconds(lambda: policy.update(examples, spec)),
        },
        arguments.rounds,
    )
    rows = _rows("update", times, baseline="transformers, padded batches")
    for row in rows:
        row["tokens/s"] = tokens / row["seconds"]
    return rows


def _train_plain(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, examples: list[Example], budget: int
) -> None:
    """Train on batches sorted by length, padded on the right, as large as the token budget allows."""
    device = next(model.parameters()).device
    total = sum(len(example.response_ids) for example in examples)
    queue = sorted(examples, key=lambda example: example.num_tokens)
    optimizer.zero_grad()
    while queue:
        width = max(1, budget // queue[-1].num_tokens)
        batch, queue = queue[-width:], queue[:-width]
        longest = batch[-1].num_tokens
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        weights = torch.zeros(len(batch), longest)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, example in enumerate(batch):
            sequence = np.concatenate([example.prompt_ids, example.response_ids])
            ids[row, : len(sequence)] = torch.from_numpy(sequence)
            mask[row, : len(sequence)] = 1
            weights[row, len(example.prompt_ids) : len(sequence)] = torch.from_numpy(example.advantages_T)
        ids, weights, mask = ids.to(device), weights.to(device), mask.to(device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        logprobs = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        (-(logprobs * weights[:, 1:].flatten()).sum() / total).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _seconds(work: Callable[[], object]) -> float:
    _wait()
    began = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _rounds(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run each case once per round, in turn, after one warm-up round; return seconds by case."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            seconds = case()
            if number:
                times[name].append(seconds)
    return times


def _rows(group: str, times: dict[str, list[float]], baseline: str) -> list[dict]:
    return [
        {
            "group": group,
            "what": name,
            "seconds": statistics.median(seconds),
            "ratio": statistics.median(a / b for a, b in zip(seconds, times[baseline], strict=True)),
            "to": baseline,
        }
        for name, seconds in times.items()
    ]


def _show(rows: list[dict], arguments: argparse.Namespace) -> None:
    columns = ["group", "what", "seconds", "ratio", "to", "teacher s", "update s", "tokens/s"]
    table = Table(*columns, title=f"{arguments.model.name}, {arguments.dtype}, {arguments.threads} thread(s)")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console(width=160).print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    print(f"peak memory of the process: {peak:.2f} GiB" + (f"; of the GPU: {gpu:.2f} GiB" if gpu else ""))
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items() if key != "json"}
        settings["model"] = arguments.model.name
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
        record = {"settings": settings, "machine": machine, "torch": torch.__version__, "peak_gib": peak, "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
