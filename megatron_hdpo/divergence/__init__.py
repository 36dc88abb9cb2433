"""Divergences between a student and a teacher over a sharded vocabulary, exact in value and gradient.

Imports torch (and Triton) and `types/divergences.py`, nothing else. Start with `kinds.py` (the formulas), then
`losses.py` (the functions on logits) and `head.py` (the same from hidden states); docs/divergence.md has the proofs.
"""

from megatron_hdpo.divergence.head import head_loss, head_losses
from megatron_hdpo.divergence.kinds import JSD, KINDS, TAILS, DivergenceSpec
from megatron_hdpo.divergence.losses import Losses, divergence, logit_losses, vocab_parallel_entropy
from megatron_hdpo.divergence.targets import FullLogits, Hidden, Target, TopK
from megatron_hdpo.divergence.vocab_parallel import vocab_parallel_logprobs, vocab_parallel_topk

__all__ = [
    "JSD",
    "KINDS",
    "TAILS",
    "DivergenceSpec",
    "FullLogits",
    "Hidden",
    "Losses",
    "Target",
    "TopK",
    "divergence",
    "head_loss",
    "head_losses",
    "logit_losses",
    "vocab_parallel_entropy",
    "vocab_parallel_logprobs",
    "vocab_parallel_topk",
]
