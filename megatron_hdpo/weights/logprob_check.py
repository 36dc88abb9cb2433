"""Comparison of log-probs over the whole vocabulary with those of `transformers`, on short and on long texts.

transformers runs first and leaves its last hidden states and its head, so that the two models are not in memory at the
same time, and log-probs are made and compared a few positions at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.checks import Check
from megatron_hdpo.weights.logprobs import packed_logprob_rows

LONGEST = 4096
"""Tokens of the longest text, where the model's context allows it."""
_TEXTS = (
    "Natalia has 12 pencils and gives a third of them away. How many are left?",
    "The derivative of x^3 + 2x is 3x^2 + 2, so at x = 2 the slope is 14.",
    "Two trains leave at 9:15; the faster one covers 180 km in 1 h 30 min.\nIts speed is 120 km/h.",
)
_RANDOM_LENGTHS = (3, 41, 96)


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed differences of log-probs (natural logarithm, fp32, whole vocabulary)."""

    max: float = 1e-3
    mean: float = 1e-4


@dataclass(frozen=True)
class Reference:
    """What transformers makes of the rows: the input of its head, fp32 [length, H] for each sequence, and the head."""

    rows: list[list[Tensor]]
    head: nn.Module

    @torch.no_grad()
    def logprobs(self, row: int, sequence: int, first: int, rows: int) -> Tensor:
        """Return log_softmax of the next token at positions first to first + rows - 1, fp32 [rows, V]."""
        return torch.log_softmax(self.head(self.rows[row][sequence][first : first + rows]).float(), dim=-1)


def texts(folder: Path, architecture: Architecture, longest: int) -> list[list[np.ndarray]]:
    """Return packed rows of token ids: short sequences in one row, and each long one in its own.

    Half of them are random ids; the others are text, if the folder has a tokenizer. No sequence is longer than
    `longest` or the model's context.
    """
    longest = min(longest, architecture.max_positions)
    generator = np.random.default_rng(0)
    lengths = [min(length, longest) for length in _RANDOM_LENGTHS]
    short = [generator.integers(0, architecture.vocab_size, length) for length in lengths]
    long = [generator.integers(0, architecture.vocab_size, longest)]
    if any(folder.glob("tokenizer*")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        short += [_ids(tokenizer, text, longest, architecture.vocab_size) for text in _TEXTS]
        long.append(_ids(tokenizer, _long_text(longest), longest, architecture.vocab_size))
    return [[ids for ids in short if len(ids)], *([ids] for ids in long if len(ids) > max(_RANDOM_LENGTHS))]


@torch.no_grad()
def read_reference(folder: Path, rows: list[list[np.ndarray]]) -> Reference:
    """Run transformers' model in fp32 on every sequence, one at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    hidden = [[model.model(torch.from_numpy(ids)[None]).last_hidden_state[0] for ids in row] for row in rows]
    return Reference(hidden, model.get_output_embeddings())


def check_logprobs(
    model: nn.Module,
    architecture: Architecture,
    context: ParallelContext,
    rows: list[list[np.ndarray]],
    reference: Reference | None,
    tolerance: Tolerance,
    name: str,
) -> Check:
    """Compare the model's log-probs with those of the reference, which the leader has. Collective."""
    found = [_Differences() for row in rows for _ in row]
    numbers = count()
    for row, sequences in enumerate(rows):
        own = [next(numbers) for _ in sequences]
        for sequence, first, ours_RV in packed_logprob_rows(model, architecture, context, sequences):
            if reference is not None:
                found[own[sequence]].add(ours_RV, reference.logprobs(row, sequence, first, len(ours_RV)))
    found = context.broadcast_object(found)
    largest, mean = (float(value) for value in np.max([[each.largest, each.mean] for each in found], axis=0))
    lengths = [len(ids) for row in rows for ids in row]
    summary = (
        f"{len(found)} texts of up to {max(lengths):,} tokens, fp32: max difference {largest:.2e}, mean of the worst "
        f"text {mean:.2e}"
    )
    details = [f"  allowed: max {tolerance.max:.0e}, mean {tolerance.mean:.0e}"]
    for number, (length, each) in enumerate(zip(lengths, found, strict=True)):
        details.append(f"  text {number} ({length} tokens): max {each.largest:.2e}, mean {each.mean:.2e}")
    passed = largest <= tolerance.max and mean <= tolerance.mean  # false for NaN too
    return Check(f"{name}: log-probs against transformers", passed, summary, tuple(details))


class _Differences:
    """Largest and mean absolute difference of the log-probs of one text, over positions and vocabulary."""

    def __init__(self) -> None:
        self.largest, self._sum, self._count = 0.0, 0.0, 0

    def add(self, ours_RV: Tensor, theirs_RV: Tensor) -> None:
        """Count a few positions."""
        difference_RV = (ours_RV - theirs_RV).abs()
        self.largest = float(np.maximum(self.largest, float(difference_RV.max())))  # NaN stays
        self._sum += float(difference_RV.sum(dtype=torch.float64))
        self._count += difference_RV.numel()

    @property
    def mean(self) -> float:
        """Return the mean over all positions so far; NaN without any."""
        return self._sum / self._count if self._count else float("nan")


def _ids(tokenizer: Any, text: str, longest: int, vocab_size: int) -> np.ndarray:
    """Return the first tokens of a text, without those that the model has no row for."""
    ids = np.asarray(tokenizer(text)["input_ids"], dtype=np.int64)
    return ids[ids < vocab_size][:longest]


def _long_text(tokens: int) -> str:
    """Return a text of at least so many tokens in any tokenizer: sums, each different from the others."""
    lines = (f"{n} plus {n * n} is {n + n * n}." for n in range(1, tokens // 4 + 2))
    return "\n".join([*_TEXTS, *lines])
