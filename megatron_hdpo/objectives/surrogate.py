"""The clipped surrogate of policy-gradient methods, per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hdpo.types.learning import SurrogateConfig


@dataclass(frozen=True)
class Surrogate:
    """Loss of each token, with the numbers of its metrics.

    loss_T has the gradient; ratio_T, clipped_T (bool) and importance_T are detached.
    """

    loss_T: Tensor
    ratio_T: Tensor
    clipped_T: Tensor
    importance_T: Tensor


def clipped_surrogate(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    rollout_logprobs_T: Tensor,
    advantages_T: Tensor,
    config: SurrogateConfig,
) -> Surrogate:
    """Return the clipped surrogate of each token.

    The loss is max(-A r, -A clip(r, 1 - low, 1 + high)) with r = exp(log q - log q_old); where A < 0 and `dual_clip` is
    c, at most -A c. With `importance_cap` each token is weighted by the detached, capped probability ratio of trainer
    to engine. All inputs are [T]; pass logprobs_T.detach() as old_logprobs_T for one update per step. `config.ratio` is
    not read here: for a ratio per sequence, pass denominators that make every token's ratio that of the sequence.
    """
    log_ratio = logprobs_T - old_logprobs_T
    ratio = log_ratio.detach().exp()
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    negative_T = -advantages_T
    bound = negative_T * clipped_ratio
    held = clipped = bound > negative_T * ratio
    if config.dual_clip is not None:
        dual = (advantages_T < 0) & (ratio > config.dual_clip)
        bound = torch.where(dual, negative_T * config.dual_clip, bound)
        held = held | dual
    # A clipped ratio has no gradient; if its exp overflows, autograd would compute 0 * inf, so use 0 in its place.
    loss = torch.where(held, bound, negative_T * torch.where(held, 0.0, log_ratio).exp())
    importance = (old_logprobs_T.detach() - rollout_logprobs_T).exp()
    if config.importance_cap is not None:
        importance = importance.clamp(max=config.importance_cap)
        loss = loss * importance
    return Surrogate(loss, ratio, clipped, importance)
