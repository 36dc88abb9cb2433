"""Floating-point operations of a model, from its architecture and the true lengths of its sequences.

The planner and the metrics of a run use only these functions. They count useful operations: a product of [m, k] and [k,
n] is 2 m k n; causal attention costs half of full attention; the head counts on the rows that it reads; of a mixture
only the experts that a token visits. Recomputation and padding count 0. Norms, rotation and softmax are left out, as is
usual in the field.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_hdpo.model.architecture import Architecture

FORWARD, FORWARD_AND_BACKWARD = 1, 3
"""Arithmetic in forward passes: the backward pass has two products for each one of the forward pass."""


def attention_product_flops(a: Architecture) -> float:
    """Return the FLOPs of one layer's QKV and output projections per token, forward."""
    query, key_value = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    return 2.0 * a.hidden_size * (2 * query + 2 * key_value)


def ffn_flops(a: Architecture) -> float:
    """Return the FLOPs of one layer's FFN per token, forward: gate, up, down; or visited experts and router."""
    if not a.num_experts:
        return 6.0 * a.hidden_size * a.ffn_size
    return 6.0 * a.hidden_size * a.expert_ffn_size * a.experts_per_token + 2.0 * a.hidden_size * a.num_experts


def product_flops(a: Architecture) -> float:
    """Return the FLOPs of one layer's matrix products per token, forward."""
    return attention_product_flops(a) + ffn_flops(a)


def attention_flops(a: Architecture, length: float) -> float:
    """Return the FLOPs of one layer's causal attention per token of a sequence, forward: half of 4 width length."""
    return 2.0 * a.num_heads * a.head_dim * length


def head_flops(a: Architecture) -> float:
    """Return the FLOPs of the head per row that it reads, forward, without the padding of the vocabulary."""
    return 2.0 * a.hidden_size * a.vocab_size


def forward_flops(a: Architecture, sequences: Iterable[tuple[float, float]]) -> float:
    """Return the FLOPs of one forward pass over sequences, each (tokens, rows that the head reads)."""
    return sum(
        length * a.num_layers * (product_flops(a) + attention_flops(a, length)) + rows * head_flops(a)
        for length, rows in sequences
    )


def decoding_flops(a: Architecture, prompt: float, response: float) -> float:
    """Return the FLOPs of sampling a response after a prompt in the cache; a new token attends to all before it."""
    seen = prompt + response / 2
    return response * (a.num_layers * (product_flops(a) + 2 * attention_flops(a, seen)) + head_flops(a))
