"""Sampling mathematics: from next-token logits and uniform numbers to token ids and their log-probs.

All functions are pure and no row depends on another, so a sample is a function of its own logits and uniforms alone.
Sums run over short blocks in float32 and over the blocks in float64.

Shape suffixes: B rows, V vocabulary, K top tokens, C candidates, N blocks, S tokens per block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_hdpo.types.transfer import to_device

_BLOCK = 128  # tokens per block of the two-level search; divides the usual vocabulary sizes, so no copy is needed
_FIRST_CANDIDATES = 256  # number of most likely tokens that top-p tries first; it seldom needs more


@dataclass(frozen=True)
class RowParams:
    """Sampling parameters of B rows, on the device of the logits.

    temperature_B: float32, 1 for greedy rows. greedy_B: bool. top_k_B: int64, the vocabulary size for no limit.
    top_p_B: float64, 1 for no limit. The flags are Python bools: reading them from the device would stall it.
    """

    temperature_B: torch.Tensor
    greedy_B: torch.Tensor
    top_k_B: torch.Tensor
    top_p_B: torch.Tensor
    any_scaled: bool
    any_greedy: bool
    any_truncated: bool


@dataclass(frozen=True)
class Draw:
    """Drawn tokens of B rows.

    ids_B: int64. logprobs_B: float32. finite_B: bool, False where the logits were not a distribution. top_ids_BK,
    top_logprobs_BK: the K most likely tokens (int64, float32), None where K is 0.
    """

    ids_B: torch.Tensor
    logprobs_B: torch.Tensor
    finite_B: torch.Tensor
    top_ids_BK: torch.Tensor | None = None
    top_logprobs_BK: torch.Tensor | None = None


def uniforms(seed: int, sample_index: int, count: int) -> np.ndarray:
    """Return float64 [count, 2] uniforms in [0, 1), one pair per token; equal on every machine.

    A pure function of (seed, sample_index): Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
    3") with the pair as its key. Raw words are used because NumPy guarantees only their stream to stay the same.
    """
    words = np.random.Philox(key=np.array([seed, sample_index], dtype=np.uint64)).random_raw(2 * count)
    return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(count, 2)


def row_params(
    temperatures: list[float], top_ks: list[int | None], top_ps: list[float], vocab_size: int, device: torch.device
) -> RowParams:
    """Return RowParams from per-row settings: temperature 0 means greedy, top_k None and top_p 1 mean no limit."""
    greedy = [t == 0.0 for t in temperatures]
    scales = [1.0 if t == 0.0 else t for t in temperatures]
    ks = [vocab_size if k is None else min(k, vocab_size) for k in top_ks]
    return RowParams(
        temperature_B=to_device(torch.tensor(scales, dtype=torch.float32), device),
        greedy_B=to_device(torch.tensor(greedy), device),
        top_k_B=to_device(torch.tensor(ks, dtype=torch.int64), device),
        top_p_B=to_device(torch.tensor(top_ps, dtype=torch.float64), device),
        any_scaled=any(t != 1.0 for t in scales),
        any_greedy=any(greedy),
        any_truncated=any(not g and (k < vocab_size or p < 1.0) for g, k, p in zip(greedy, ks, top_ps, strict=True)),
    )


def sample(logits_BV: torch.Tensor, u_B2: torch.Tensor, params: RowParams, top_logprobs: int = 0) -> Draw:
    """Draw one token per row by `inverse_cdf`, or the most likely one where the row is greedy.

    logits_BV: any float dtype, real vocabulary only. u_B2: float64 uniforms in [0, 1). Log-probs are those of
    log_softmax(logits / temperature) over all V, before top-k and top-p. Top-k is applied first, then top-p to what is
    left, renormalised; both break ties in favour of the lower id.
    """
    scaled_BV = logits_BV.float()
    if params.any_scaled:
        scaled_BV = scaled_BV / params.temperature_B[:, None]
    peak_B1 = scaled_BV.amax(-1, keepdim=True)
    weights_BV = (scaled_BV - peak_B1).exp_()
    normaliser_B = _blocks(weights_BV).sum(-1).sum(-1, dtype=torch.float64)
    log_normaliser_B = peak_B1[:, 0].double() + normaliser_B.log()
    tops = scaled_BV.topk(top_logprobs, dim=-1) if top_logprobs else None

    if params.any_truncated:
        weights_BV = truncate(weights_BV, normaliser_B, params.top_k_B, params.top_p_B)
    ids_B = inverse_cdf(weights_BV, u_B2)
    if params.any_greedy:
        ids_B = torch.where(params.greedy_B, scaled_BV.argmax(-1), ids_B)
    chosen_B = scaled_BV.gather(1, ids_B[:, None])[:, 0]
    return Draw(
        ids_B=ids_B,
        logprobs_B=(chosen_B.double() - log_normaliser_B).float(),
        finite_B=normaliser_B.isfinite(),
        top_ids_BK=tops.indices if tops else None,
        top_logprobs_BK=(tops.values.double() - log_normaliser_B[:, None]).float() if tops else None,
    )


def truncate(
    weights_BV: torch.Tensor, normaliser_B: torch.Tensor, top_k_B: torch.Tensor, top_p_B: torch.Tensor
) -> torch.Tensor:
    """Zero every weight outside top-k and then outside top-p; return float32 [B, V].

    Top-p keeps the smallest set of most likely tokens with mass >= p (Holtzman et al. 2020). weights_BV: not negative,
    not necessarily normalised; normaliser_B: their float64 sums. Rows with neither limit are returned unchanged.
    """
    kept_B, threshold_B = _kept_counts(weights_BV, normaliser_B, top_k_B, top_p_B)
    above_BV = weights_BV > threshold_B[:, None]
    tied_BV = weights_BV == threshold_B[:, None]
    room_B = kept_B - above_BV.sum(-1)
    if bool((tied_BV.sum(-1) > room_B).any()):
        tied_BV &= tied_BV.cumsum(-1) <= room_B[:, None]
    limited_B1 = ((top_k_B < weights_BV.shape[-1]) | (top_p_B < 1.0))[:, None]
    return torch.where(above_BV | tied_BV | ~limited_B1, weights_BV, 0.0)


def _kept_counts(
    weights_BV: torch.Tensor, normaliser_B: torch.Tensor, top_k_B: torch.Tensor, top_p_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many of the most likely tokens each row keeps (int64 [B]), and the smallest kept weight (float32 [B]).

    Sorting a whole vocabulary is expensive, so a few candidates are sorted first, and more only while a row needs more.
    """
    vocab = weights_BV.shape[-1]
    no_k_B, no_p_B = top_k_B >= vocab, top_p_B >= 1.0
    needed = int(torch.where(no_k_B, 1, top_k_B).max())
    count = min(vocab, max(_FIRST_CANDIDATES, needed))
    while True:
        candidates_BC = weights_BV.topk(count, dim=-1).values
        mass_BC = candidates_BC.double().cumsum(-1)
        mass_in_k_B = mass_BC.gather(1, (top_k_B.clamp(max=count) - 1)[:, None])[:, 0]
        target_B = top_p_B * torch.where(no_k_B, normaliser_B, mass_in_k_B)
        if count == vocab or bool((~no_k_B | no_p_B | (mass_BC[:, -1] >= target_B)).all()):
            break
        count = min(vocab, count * 8)
    before_BC = mass_BC - candidates_BC.double()
    within_p_B = torch.where(no_p_B, count, (before_BC < target_B[:, None]).sum(-1).clamp(min=1))
    kept_B = torch.minimum(top_k_B, within_p_B)
    return kept_B, candidates_BC.gather(1, (kept_B - 1)[:, None])[:, 0]


def inverse_cdf(weights_BV: torch.Tensor, u_B2: torch.Tensor) -> torch.Tensor:
    """Draw an id with probability proportional to its weight; return int64 [B]. Never draws an id of weight 0.

    Inverse CDF in two levels: u_B2[:, 0] picks a block of consecutive ids by the blocks' sums, u_B2[:, 1] picks an id
    within it. As exact as one search over the vocabulary, and less sensitive to rounding of the cumulative sum.
    """
    blocks_BNS = _blocks(weights_BV)
    block_B = _first_beyond(blocks_BNS.sum(-1), u_B2[:, 0])
    rows_B = torch.arange(weights_BV.shape[0], device=weights_BV.device)
    ids_B = block_B * _BLOCK + _first_beyond(blocks_BNS[rows_B, block_B], u_B2[:, 1])
    return ids_B.clamp_(max=weights_BV.shape[1] - 1)  # a row of NaN ends in the padding; its draw is not used


def _first_beyond(weights_BN: torch.Tensor, u_B: torch.Tensor) -> torch.Tensor:
    """Return the first index whose cumulative weight exceeds u times the row's sum; int64 [B]."""
    cdf_BN = weights_BN.double().cumsum(-1)
    index_B1 = torch.searchsorted(cdf_BN, u_B[:, None] * cdf_BN[:, -1:], right=True)
    return index_B1[:, 0].clamp_(max=weights_BN.shape[1] - 1)  # a row of NaN finds no index


def _blocks(weights_BV: torch.Tensor) -> torch.Tensor:
    """View [B, V] as [B, V / block, block], padded with zeros where the block does not divide V."""
    padding = -weights_BV.shape[-1] % _BLOCK
    if padding:
        weights_BV = torch.nn.functional.pad(weights_BV, (0, padding))
    return weights_BV.view(weights_BV.shape[0], -1, _BLOCK)
