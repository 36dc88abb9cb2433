"""Activation memory: what a forward pass keeps for the backward pass, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace

from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.costs.micro_batch_shape import PackedShape
from megatron_hdpo.costs.parameters import head_values
from megatron_hdpo.costs.schedule import held_at_most
from megatron_hdpo.divergence.shard import _GPU_BLOCK_BYTES
from megatron_hdpo.model.architecture import Architecture

_FP32 = 4
_INT64 = 8


def layer_bytes(architecture: Architecture, layout: Layout, shape: PackedShape) -> int:
    """Return the bytes that one decoder layer keeps of a micro-batch; rows as `PackedShape.padded` returns them."""
    return _norm_bytes(architecture, layout, shape.rows) + attention_bytes(architecture, layout, shape) + ffn_bytes(
        architecture, layout, shape.rows
    )  # fmt: skip


def _plain(layout: Layout) -> bool:
    return layout.spec == "torch"


def _norm_bytes(a: Architecture, layout: Layout, rows: int) -> int:
    """Return the bytes of a layer's two norms. Per row: 1 / rms and the input.

    The norm of plain torch computes in fp32 and also keeps the normed rows before their scale.
    """
    own, value = rows // layout.sequence_ranks, layout.value_bytes
    return 2 * own * (_FP32 + a.hidden_size * ((_FP32 + value) if _plain(layout) else value))


def _input_bytes(a: Architecture, layout: Layout, rows: int, norm_apart: bool = False) -> int:
    """Return the bytes of the rows that QKV, or the FFN, reads: normed and scaled.

    norm_apart: the norm before the router is a module of its own, also under Transformer Engine, and can be recomputed;
    the other norms are fused into the product after them.
    """
    if norm_apart and "layernorm" in layout.recomputed:
        return 0
    fp8 = layout.fp8 and not norm_apart
    return rows // layout.sequence_ranks * a.hidden_size * (1 if fp8 else layout.value_bytes)


def attention_bytes(a: Architecture, layout: Layout, shape: PackedShape) -> int:
    """Return the bytes that attention keeps, from the normed rows to the input of the output projection."""
    rows, value = shape.rows, layout.value_bytes
    query, key_value, _ = _widths(a, layout)
    core = "core_attn" in layout.recomputed
    statistics = rows * a.num_heads // layout.tensor * _FP32  # log-sum-exp
    if not _plain(layout):
        kept = rows * (2 * query + 3 * key_value) * value + rows * query * (1 if layout.fp8 else value)
        kept += _input_bytes(a, layout, rows)
        return kept + (0 if core else statistics) + _head_norms(a, layout, rows)
    rotation = 4 * rows * a.head_dim * value  # cos and sin, for query and for key
    total = _input_bytes(a, layout, rows) + rotation + rows * query * value + _head_norms(a, layout, rows)
    if layout.context == 1:  # the value is a view of query, key and value; the other two are rotated copies
        total += rows * (query + 2 * key_value) * value + rows * (query + key_value) * value
    else:  # a rank's two chunks of a sequence attend to 2 context + 1 chunks of keys and values between them
        every = rows * (2 * layout.context + 1) // 2
        total += rows * query * value + every * 2 * key_value * value
    return total + (0 if core else statistics)


def ffn_bytes(a: Architecture, layout: Layout, rows: int) -> int:
    """Return the bytes that the FFN keeps, from the normed rows to its last product."""
    inputs = _input_bytes(a, layout, rows, norm_apart=a.num_experts > 0)
    if a.num_experts:
        return inputs + (0 if "moe" in layout.recomputed else _experts_bytes(a, layout, rows))
    return inputs + (0 if "mlp" in layout.recomputed else gated_bytes(a, layout, rows))


def gated_bytes(a: Architecture, layout: Layout, rows: int) -> int:
    """Return the bytes that a dense FFN keeps between its products.

    Plain: gate and up together, silu(gate), up + 0, their product. Fused: gate and up, the product.
    """
    value, ffn = layout.value_bytes, a.ffn_size // layout.tensor
    return rows * ffn * (5 * value if _plain(layout) else 2 * value + (1 if layout.fp8 else value))


def _experts_bytes(a: Architecture, layout: Layout, rows: int) -> int:
    """Return the bytes of router and experts.

    Assumes a balanced router: the experts of a rank process own tokens x experts per token rows.
    """
    value, own = layout.value_bytes, rows // layout.sequence_ranks
    places = own * a.experts_per_token * layout.expert_tensor
    ffn = a.expert_ffn_size // layout.expert_tensor
    if not _plain(layout):
        fp8 = 1 if layout.fp8 else value
        router = own * (a.num_experts * (2 * _FP32 + 1) + a.experts_per_token * (_FP32 + _INT64))
        return router + places * (a.hidden_size * fp8 + ffn * (2 * value + fp8) + _FP32)
    # Logits and chosen logits in fp32, and their positions; with a softmax before the choice, twice the logits.
    per_expert, per_choice = (_FP32 + 1, 12) if a.normalised_routing else (2 * _FP32 + 1, 8)
    router = own * (a.num_experts * per_expert + a.experts_per_token * per_choice)
    return router + places * (a.hidden_size + 6 * ffn) * value + places * (_FP32 + _INT64)


def _head_norms(a: Architecture, layout: Layout, rows: int) -> int:
    if not a.qk_norm:
        return 0
    query, key_value, _ = _widths(a, layout)
    heads = (a.num_heads + a.num_kv_heads) // layout.tensor
    fp32 = _FP32 if _plain(layout) else 0
    return rows * (heads * _FP32 + (query + key_value) * (fp32 + layout.value_bytes))


def _widths(a: Architecture, layout: Layout) -> tuple[int, int, int]:
    """Return this rank's number of columns of query, of key (or value), and of the FFN."""
    return (
        a.num_heads * a.head_dim // layout.tensor,
        a.num_kv_heads * a.head_dim // layout.tensor,
        a.ffn_size // layout.tensor,
    )


def chunk_bytes(architecture: Architecture, layout: Layout, stage: int, shape: PackedShape) -> list[int]:
    """Return the bytes that one micro-batch keeps on a stage until its backward pass, by chunk of layers."""
    a, rows = architecture, shape.rows
    hidden = rows // layout.sequence_ranks * a.hidden_size
    layers = a.num_layers // (layout.pipeline * layout.virtual_stages)
    per_layer = hidden * layout.value_bytes if layout.recompute else layer_bytes(a, layout, shape)
    sizes = [layers * per_layer] * layout.virtual_stages
    if stage == 0:  # token ids, and a mask of those that are another rank's
        sizes[0] += rows * (_INT64 + (1 if layout.tensor > 1 else 0))
    sizes[-1] += final_norm_bytes(a, layout, stage, rows)
    return sizes


def stage_bytes(architecture: Architecture, layout: Layout, stage: int, shape: PackedShape) -> int:
    """Return the bytes that one micro-batch keeps on a stage, over all its chunks."""
    return sum(chunk_bytes(architecture, layout, stage, shape))


def final_norm_bytes(architecture: Architecture, layout: Layout, stage: int, rows: int) -> int:
    """Return the bytes that the norm after the last layer keeps; it is the first whose backward pass frees them."""
    if stage < layout.pipeline - 1:
        return 0
    own, fp32 = rows // layout.sequence_ranks, _FP32 if _plain(layout) else 0
    return own * (_FP32 + architecture.hidden_size * (fp32 + layout.value_bytes))


def recomputed_bytes(architecture: Architecture, layout: Layout, shape: PackedShape) -> int:
    """Return the bytes of one layer that its backward pass computes again; 0 without recomputation."""
    if layout.recompute:
        return layer_bytes(architecture, layout, shape)
    if "mlp" in layout.recomputed or "moe" in layout.recomputed:
        return ffn_bytes(architecture, _kept(layout), shape.rows)
    return 0


def _kept(layout: Layout) -> Layout:
    return replace(layout, recomputed=())


def activation_peak(
    architecture: Architecture, layout: Layout, stage: int, shape: PackedShape, micro_batches: int
) -> float:
    """Return the largest number of bytes that a stage's micro-batches in flight hold, without recomputed tensors."""
    return held_at_most(layout, stage, micro_batches, chunk_bytes(architecture, layout, stage, shape))


def pipeline_input_peak(
    architecture: Architecture, layout: Layout, stage: int, shape: PackedShape, micro_batches: int
) -> float:
    """Return the bytes of received inputs of the micro-batches in flight, each kept until its gradient is sent back."""
    one = shape.rows // layout.sequence_ranks * architecture.hidden_size * layout.value_bytes
    received = [one * int(stage > 0 or chunk > 0) for chunk in range(layout.virtual_stages)]
    return held_at_most(layout, stage, micro_batches, received)


def head_chunk_bytes(architecture: Architecture, layout: Layout, shape: PackedShape, chunk: int) -> int:
    """Return the bytes of one chunk's logits; for targets over the whole vocabulary also their fp32 scratch."""
    width = architecture.padded_vocab_size(layout.tensor) // layout.tensor
    chunk = min(chunk, shape.responses)
    logits = chunk * width * layout.value_bytes
    return 2 * logits + 3 * min(_GPU_BLOCK_BYTES, chunk * width * _FP32) if shape.full else logits


def scored_chunk_bytes(architecture: Architecture, layout: Layout, shape: PackedShape, chunk: int) -> int:
    """Return the bytes of one chunk's logits when scoring, and of two fp32 buffers for their top k."""
    width = architecture.padded_vocab_size(layout.tensor) // layout.tensor
    chunk = min(chunk, shape.responses)
    scratch = 2 * min(_GPU_BLOCK_BYTES, chunk * width * _FP32) if shape.top_k else 0
    return chunk * width * layout.value_bytes + scratch


def head_gradient_bytes(architecture: Architecture, layout: Layout, shape: PackedShape) -> int:
    """Return the bytes of the gradients that the head's autograd node holds.

    The head's gradient in fp32 and again in the model's type, that of the hidden states, and the hidden states at the
    response rows.
    """
    hidden = 2 * shape.responses * architecture.hidden_size * layout.value_bytes
    return head_values(architecture, layout.tensor) * (_FP32 + layout.value_bytes) + hidden


def input_bytes(shape: PackedShape, last: bool) -> int:
    """Return the bytes of one micro-batch's inputs on the device.

    Token ids, positions; on the last stage six numbers of each response token, its row and id, and its target.
    """
    rows = 2 * shape.rows * _INT64
    if not last:
        return rows
    return rows + shape.responses * (6 * _FP32 + 2 * _INT64) + shape.targets * (shape.top_k * (_INT64 + _FP32) + _INT64)
