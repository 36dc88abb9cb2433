"""Verification of a conversion: complete tensors, a bit-equal round trip, and log-probs equal to `transformers`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.convert import Checkpoint, inspect, open_model
from megatron_hdpo.weights.errors import WeightsError, listed
from megatron_hdpo.weights.hf_files import HfWeights
from megatron_hdpo.weights.logprobs import packed_logprobs
from megatron_hdpo.weights.save import save_hf
from megatron_hdpo.weights.stream import same_bits, stream_hf

T = TypeVar("T")

_TEXTS = (
    "Natalia has 12 pencils and gives a third of them away. How many are left?",
    "The derivative of x^3 + 2x is 3x^2 + 2, so at x = 2 the slope is 14.",
    "Two trains leave at 9:15; the faster one covers 180 km in 1 h 30 min.\nIts speed is 120 km/h.",
)
_RANDOM_LENGTHS = (3, 41, 96)


@dataclass(frozen=True)
class Check:
    """One result of the verification. details: names and reasons if it failed."""

    name: str
    passed: bool
    summary: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed differences of log-probs (natural logarithm, fp32, whole vocabulary)."""

    max: float = 1e-3
    mean: float = 1e-4


def verify(
    first: str | Path,
    second: str | Path | None,
    context: ParallelContext,
    *,
    config: str | Path | None = None,
    tolerance: Tolerance | None = None,
    scratch: str | Path | None = None,
) -> list[Check]:
    """Check on the run's layout that `second` is a conversion of `first`; without `second`, that `first` survives one.

    Collective over all ranks; every rank gets the checks, in order, up to the first stage that failed.
    The leader holds the `transformers` model in fp32 in addition to its shard. If no folder has Hugging Face weights,
    `first` is exported to a temporary folder under `scratch`, which all ranks must see.
    Raises WeightsError if a folder is no checkpoint, or the two have different architectures.
    """
    checkpoints = [inspect(path, config) for path in (first, second) if path is not None]
    if len({checkpoint.architecture for checkpoint in checkpoints}) > 1:
        raise WeightsError(f"{first} and {second} are of two architectures: neither is a conversion of the other")
    with tempfile.TemporaryDirectory(dir=scratch) as own_folder:
        folder = Path(context.broadcast_object(own_folder))
        reference = next((c for c in checkpoints if c.format == "huggingface"), None)
        others = [checkpoint for checkpoint in checkpoints if checkpoint is not reference]
        checks: list[Check] = []
        if reference is None:
            reference, checks = _export(checkpoints[0], folder / f"{checkpoints[0].path.name}-exported", context)
        for checkpoint in (reference, *others):
            if all(check.passed for check in checks):
                checks += _check_tensors(checkpoint, reference, context)
        if all(check.passed for check in checks):
            tested = others[-1] if others else reference
            checks.append(_check_logprobs(tested, reference, tolerance or Tolerance(), context))
        context.barrier("verification done, temporary files may go")
    return checks


def print_checks(checks: list[Check], console: Console) -> None:
    """Print a table of the checks, and below it the details of those that failed."""
    table = Table("check", "result", "what was found")
    for check in checks:
        result = Text("passed", "green") if check.passed else Text("FAILED", "red")
        table.add_row(Text(check.name), result, Text(check.summary))
    console.print(table)
    for line in (line for check in checks if not check.passed for line in check.details):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _on_all_ranks(context: ParallelContext, action: Callable[[], T]) -> tuple[T | None, tuple[str, ...]]:
    """Run `action` on every rank; return its result, or None and the problems of all ranks if any rank failed."""
    result, problem = None, None
    try:
        result = action()
    except WeightsError as error:
        problem = str(error)
    context.barrier("checkpoint read")
    problems = dict.fromkeys(text for text in context.gather_objects(problem) if text is not None)
    return (None if problems else result), tuple(problems)


def _export(checkpoint: Checkpoint, folder: Path, context: ParallelContext) -> tuple[Checkpoint, list[Check]]:
    def export() -> None:
        model = open_model(checkpoint, context)
        save_hf(model, checkpoint.architecture, context, checkpoint.description, folder)

    _, problems = _on_all_ranks(context, export)
    exported = Checkpoint(folder, "huggingface", checkpoint.architecture, folder)
    summary = "could not be exported" if problems else "written to a temporary folder, as the reference"
    return exported, [Check(f"{checkpoint.path.name}: export to Hugging Face", not problems, summary, problems)]


def _check_tensors(checkpoint: Checkpoint, reference: Checkpoint, context: ParallelContext) -> list[Check]:
    """Load a checkpoint on the layout, stream it back, and compare with the files of `reference`."""
    layout = f"TP {context.layout.tensor} x PP {context.layout.pipeline} x EP {context.layout.expert}"
    loads = f"{checkpoint.path.name}: every tensor accounted for"
    model, problems = _on_all_ranks(context, lambda: open_model(checkpoint, context))
    if model is None:
        return [Check(loads, False, f"not loaded at {layout}", problems)]
    count, numel, differing = context.broadcast_object(_compare(model, checkpoint, reference, context))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    same = f"{checkpoint.path.name}: {layout} -> Hugging Face"
    found = f"{count - len(differing)} of {count} tensors bit-equal in {dtype} to {reference.path.name}"
    return [
        Check(loads, True, f"{count} tensors, {numel / 1e6:,.1f} M parameters, loaded at {layout}"),
        Check(same, not differing, found, tuple(listed("differing tensors", differing, limit=100))),
    ]


def _compare(
    model: GPTModel, checkpoint: Checkpoint, reference: Checkpoint, context: ParallelContext
) -> tuple[int, int, list[str]]:
    """Return the number of tensors, of elements, and the names that differ from the reference's files; leader only."""
    count, numel, differing = 0, 0, []
    with HfWeights(reference.path) as weights:
        for name, value in stream_hf(model, checkpoint.architecture, context, to="first"):
            expected = weights.read(name, 0, 0, len(value)).to(value.dtype)
            count, numel = count + 1, numel + value.numel()
            if not same_bits(value.cpu(), expected):
                differing.append(name)
    return count, numel, differing


def _check_logprobs(tested: Checkpoint, reference: Checkpoint, tolerance: Tolerance, context: ParallelContext) -> Check:
    name = f"{tested.path.name}: log-probs against transformers"
    sequences = context.broadcast_object(_sequences(reference) if context.is_leader else [])
    model, problems = _on_all_ranks(context, lambda: open_model(tested, context, "float32"))
    if model is None:
        return Check(name, False, "not loaded in float32", problems)
    ours = packed_logprobs(model, tested.architecture, context, sequences)
    del model
    problem, differences = None, []
    if context.is_leader:
        try:
            differences = _differences(ours, sequences, reference)
        except (OSError, ValueError, RuntimeError) as error:
            problem = f"transformers cannot run {reference.path}: {error}"
    context.barrier("log-probs of transformers")
    problem, differences = context.broadcast_object((problem, differences))
    if problem is not None:
        return Check(name, False, "no reference", (problem,))
    largest, mean = (float(value) for value in (np.max(differences, axis=0)[0], np.mean(differences, axis=0)[1]))
    summary = f"{len(sequences)} prompts, fp32: max difference {largest:.2e}, mean {mean:.2e}"
    details = f"  allowed: max {tolerance.max:.0e}, mean {tolerance.mean:.0e}"
    passed = largest <= tolerance.max and mean <= tolerance.mean  # false for NaN too
    rows = [
        f"  prompt {i} ({len(s)} tokens): max {d[0]:.2e}, mean {d[1]:.2e}"
        for i, (s, d) in enumerate(zip(sequences, differences, strict=True))
    ]
    return Check(name, passed, summary, (details, *rows))


def _sequences(reference: Checkpoint) -> list[np.ndarray]:
    """Return token ids of random prompts and, if the folder has a tokenizer, of real ones."""
    generator = np.random.default_rng(0)
    sequences = [generator.integers(0, reference.architecture.vocab_size, length) for length in _RANDOM_LENGTHS]
    if any(reference.path.glob("tokenizer*")):
        tokenizer = AutoTokenizer.from_pretrained(reference.path)
        sequences += [np.asarray(tokenizer(text)["input_ids"]) for text in _TEXTS]
    return sequences


@torch.no_grad()
def _differences(
    ours: list[torch.Tensor], sequences: list[np.ndarray], reference: Checkpoint
) -> list[tuple[float, float]]:
    """Compute the (largest, mean) absolute difference of each prompt's log-probs over positions and vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(reference.path, dtype=torch.float32).eval()
    found = []
    for logprobs_TV, ids in zip(ours, sequences, strict=True):
        theirs_TV = torch.log_softmax(model(torch.from_numpy(ids)[None]).logits[0], dim=-1)
        difference = (logprobs_TV - theirs_TV).abs()
        found.append((float(difference.max()), float(difference.mean())))
    return found
