"""What one pass over the logits computes, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_hdpo.divergence.kinds import DivergenceSpec
from megatron_hdpo.divergence.shard import Shard


@dataclass(frozen=True)
class Options:
    """Everything about a pass but its tensors."""

    shard: Shard
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
    """Gradients of the objective with respect to a pass's outputs, [T] each; None where there is none."""

    logprobs_T: Tensor | None
    entropy_T: Tensor | None
    divergence_T: Tensor | None


@dataclass(frozen=True)
class Outputs:
    """A pass's results, [T] each: log-probs, entropy, divergence, and the diagnostics of Losses."""

    logprobs_T: Tensor | None
    entropy_T: Tensor | None
    divergence_T: Tensor | None
    student_mass_T: Tensor | None = None
    covered_mass_T: Tensor | None = None
    teacher_top_T: Tensor | None = None

    @classmethod
    def none(cls) -> Outputs:
        return cls(None, None, None)

    def as_tuple(self) -> tuple[Tensor | None, ...]:
        main = self.logprobs_T, self.entropy_T, self.divergence_T
        return (*main, self.student_mass_T, self.covered_mass_T, self.teacher_top_T)


class Pass(Protocol):
    """A forward pass that has been made: its outputs, and O(T k) numbers from which the gradient follows."""

    @property
    def outputs(self) -> Outputs: ...

    def without_outputs(self) -> Pass:
        """The same pass for a node of autograd to keep: outputs hold the node, so the node must not hold them."""
        ...

    def gradient(self, logits_TV: Tensor, upstream: Upstream, *, inplace: bool) -> Tensor:
        """Gradient to the logits [T, V / tp], in their dtype; no communication. inplace: into their storage."""
        ...


def spread(values_R: Tensor, rows: Tensor | None, tokens: int) -> Tensor:
    """[R] -> [T]: each value at its token, 0 at tokens that have none."""
    if rows is None:
        return values_R.detach()  # another tensor: outputs get a graph that what is kept for it must not be part of
    out_T = torch.zeros(tokens, dtype=values_R.dtype, device=values_R.device)
    out_T[rows] = values_R
    return out_T


def at_rows(values_T: Tensor, rows: Tensor | None) -> Tensor:
    """[T] -> [R]: the values of the tokens that have a target."""
    return values_T if rows is None else values_T[rows]


def gradient_storage(logits_TV: Tensor, inplace: bool) -> Tensor:
    """Where the gradient goes: the logits' storage if allowed and contiguous, else a new tensor."""
    if inplace and logits_TV.is_contiguous():
        return logits_TV.detach()  # shares the version counter: autograd notices a second use of the logits
    return torch.empty_like(logits_TV, memory_format=torch.contiguous_format)
