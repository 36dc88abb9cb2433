"""Verification of a conversion: complete tensors, a bit-equal round trip, and numbers equal to `transformers`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from megatron.core.models.gpt import GPTModel

from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.checks import Check, on_all_ranks
from megatron_hdpo.weights.convert import Checkpoint, inspect, open_model
from megatron_hdpo.weights.errors import WeightsError, listed
from megatron_hdpo.weights.hf_files import HfWeights
from megatron_hdpo.weights.logprob_check import LONGEST, Tolerance, check_logprobs, read_reference, texts
from megatron_hdpo.weights.rope_check import check_rope
from megatron_hdpo.weights.save import save_hf
from megatron_hdpo.weights.stream import same_bits, stream_hf


def verify(
    first: str | Path,
    second: str | Path | None,
    context: ParallelContext,
    *,
    config: str | Path | None = None,
    tolerance: Tolerance | None = None,
    scratch: str | Path | None = None,
    longest: int = LONGEST,
) -> list[Check]:
    """Check on the run's layout that `second` is a conversion of `first`; without `second`, that `first` survives one.

    Collective over all ranks; every rank gets the checks, in order, up to the first stage that failed.
    longest: tokens of the longest text whose log-probs are compared, at most the model's context.
    Host memory: the leader holds the `transformers` model in fp32, and afterwards its head and 4 bytes x hidden size
    per token of text; then every rank holds its shard in fp32. If no folder has Hugging Face weights, `first` is
    exported to a temporary folder under `scratch`, which all ranks must see.
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
            checks += _check_numbers(tested, reference, tolerance or Tolerance(), longest, context)
        context.barrier("verification done, temporary files may go")
    return checks


def _export(checkpoint: Checkpoint, folder: Path, context: ParallelContext) -> tuple[Checkpoint, list[Check]]:
    def export() -> None:
        model = open_model(checkpoint, context)
        save_hf(model, checkpoint.architecture, context, checkpoint.description, folder)

    _, problems = on_all_ranks(context, export)
    exported = Checkpoint(folder, "huggingface", checkpoint.architecture, folder)
    summary = "could not be exported" if problems else "written to a temporary folder, as the reference"
    return exported, [Check(f"{checkpoint.path.name}: export to Hugging Face", not problems, summary, problems)]


def _check_tensors(checkpoint: Checkpoint, reference: Checkpoint, context: ParallelContext) -> list[Check]:
    """Load a checkpoint on the layout, stream it back, and compare with the files of `reference`."""
    layout = f"TP {context.layout.tensor} x PP {context.layout.pipeline} x EP {context.layout.expert}"
    loads = f"{checkpoint.path.name}: every tensor accounted for"
    model, problems = on_all_ranks(context, lambda: open_model(checkpoint, context))
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


def _check_numbers(
    tested: Checkpoint, reference: Checkpoint, tolerance: Tolerance, longest: int, context: ParallelContext
) -> list[Check]:
    """Compare the tables of positions and the log-probs of `tested` with what transformers makes of `reference`."""
    name = tested.path.name
    problem, theirs, rows = None, None, []
    if context.is_leader:
        try:
            rows = texts(reference.path, reference.architecture, longest)
            theirs = read_reference(reference.path, rows)
        except (OSError, ValueError, RuntimeError) as error:
            problem = f"transformers cannot run {reference.path}: {error}"
    context.barrier("log-probs of transformers")
    problem, rows = context.broadcast_object((problem, rows))
    if problem is not None:
        return [Check(f"{name}: transformers", False, "no reference", (problem,))]
    model, problems = on_all_ranks(context, lambda: open_model(tested, context, "float32"))
    if model is None:
        return [Check(f"{name}: in float32", False, "not loaded in float32", problems)]
    return [
        check_rope(model, tested.architecture, context, reference.path, name),
        check_logprobs(model, tested.architecture, context, rows, theirs, tolerance, name),
    ]
