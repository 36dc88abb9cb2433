"""The options, inputs and outputs that all passes over the logits share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_hdpo.divergence.kinds import DivergenceSpec
from megatron_hdpo.divergence.shard import VocabShard


@dataclass(frozen=True)
class Options:
    """All settings of a pass that are not tensors; raises ValueError on a temperature that is not positive.

    temperature: of log-probs and entropy. distill_temperature: of the divergence. logprobs, entropy: whether the pass
    returns them.
    """

    shard: VocabShard
    spec: DivergenceSpec
    temperature: float
    distill_temperature: float
    logprobs: bool
    entropy: bool

    def __post_init__(self) -> None:
        temperatures = self.temperature, self.distill_temperature
        if not all(t > 0.0 for t in temperatures):
            raise ValueError(f"temperatures are {temperatures}: they must be positive (greedy decoding counts as 1)")


@dataclass(frozen=True)
class Upstream:
    """Gradients of the objective with respect to a pass's outputs, [T] each; None for an output without gradient."""

    logprobs_T: Tensor | None
    entropy_T: Tensor | None
    divergence_T: Tensor | None


@dataclass(frozen=True)
class Outputs:
    """Results of a pass, [T] each: log-probs, entropy, divergence, and the diagnostics described in `Losses`."""

    logprobs_T: Tensor | None
    entropy_T: Tensor | None
    divergence_T: Tensor | None
    student_mass_T: Tensor | None = None
    covered_mass_T: Tensor | None = None
    teacher_top_T: Tensor | None = None

    @classmethod
    def none(cls) -> Outputs:
        """Return outputs that hold no tensor."""
        return cls(None, None, None)

    def as_tuple(self) -> tuple[Tensor | None, ...]:
        """Return the six tensors in order: first the three with gradient, then the three diagnostics."""
        main = self.logprobs_T, self.entropy_T, self.divergence_T
        return (*main, self.student_mass_T, self.covered_mass_T, self.teacher_top_T)


class Pass(Protocol):
    """A finished forward pass: its outputs, and the O(T k) numbers from which the gradient follows."""

    @property
    def outputs(self) -> Outputs:
        """Results of the pass."""
        ...

    def without_outputs(self) -> Pass:
        """Return the same pass without its outputs, for an autograd node to keep.

        The outputs refer to the node, so a node that kept them would form a reference cycle.
        """
        ...

    def gradient(self, logits_TV: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        """Compute the gradient to the logits, [T, V / tp] in their dtype, without communication.

        inplace: write it into the storage of the logits, which are destroyed.
        """
        ...


def spread(values_R: Tensor, rows: Tensor | None, tokens: int) -> Tensor:
    """Scatter values [R] of target rows to all tokens [T]; tokens without a target get 0.

    rows: int64 [R], the token of each target row; None if row i belongs to token i. tokens: T.
    """
    if rows is None:
        return values_R.detach()  # detach: the saved tensor must not be part of the output's autograd graph
    out_T = torch.zeros(tokens, dtype=values_R.dtype, device=values_R.device)
    out_T[rows] = values_R
    return out_T


def at_rows(values_T: Tensor, rows: Tensor | None) -> Tensor:
    """Select the values of the tokens that have a target: [T] -> [R]; `rows` as in `spread`."""
    return values_T if rows is None else values_T[rows]


def gradient_storage(logits_TV: Tensor, inplace: bool) -> Tensor:
    """Return the tensor to write the gradient to: the logits' storage if allowed and contiguous, else a new tensor."""
    if inplace and logits_TV.is_contiguous():
        return logits_TV.detach()  # shares the version counter, so autograd detects a second use of the logits
    return torch.empty_like(logits_TV, memory_format=torch.contiguous_format)
