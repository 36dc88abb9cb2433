"""What a micro-batch's forward pass leaves in memory for the backward pass, tensor by tensor."""

from __future__ import annotations

from megatron_hdpo.divergence.shard import _GPU_BLOCK_BYTES
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.planner.layout import Layout
from megatron_hdpo.planner.parameters import head_values
from megatron_hdpo.planner.shape_of_work import PackedShape

_FP32 = 4
_INT64 = 8


def layer_bytes(architecture: Architecture, layout: Layout, rows: int) -> int:
    """Bytes that one decoder layer keeps for `rows` tokens."""
    of = _torch_layer if layout.spec == "torch" else _transformer_engine_layer
    return of(architecture, layout, rows)


def _torch_layer(a: Architecture, layout: Layout, rows: int) -> int:
    """model/modules.py and specs.py: norms computed in fp32, unfused rotation and SwiGLU."""
    value, own = layout.value_bytes, rows // layout.sequence_ranks
    query, key_value, ffn = _widths(a, layout)
    norm = own * (_FP32 + a.hidden_size * (_FP32 + value))  # 1 / rms, fp32 input, normed rows before their scale
    inputs = 2 * own * a.hidden_size * value  # of the projections to QKV and to the FFN
    qkv = rows * (query + 2 * key_value) * value  # the value is a view of it
    rotated = rows * (query + key_value) * value + 4 * rows * a.head_dim * value  # and cos, sin for query and for key
    attended = (
        2 * rows * query * value + rows * a.num_heads // layout.tensor * _FP32
    )  # by sequence, joined, log-sum-exp
    swiglu = rows * 5 * ffn * value  # gate and up together, silu(gate), up + 0, their product
    return 2 * norm + inputs + qkv + rotated + attended + swiglu + _head_norms(a, layout, rows)


def _transformer_engine_layer(a: Architecture, layout: Layout, rows: int) -> int:
    """Fused norms, rotation, attention and SwiGLU. By reading; not yet compared with a GPU."""
    value, own = layout.value_bytes, rows // layout.sequence_ranks
    query, key_value, ffn = _widths(a, layout)
    norm = own * (_FP32 + 2 * a.hidden_size * value)
    qkv = rows * (2 * query + 3 * key_value) * value
    attended = rows * query * value + rows * a.num_heads // layout.tensor * _FP32
    return 2 * norm + qkv + attended + rows * 3 * ffn * value + _head_norms(a, layout, rows)


def _head_norms(a: Architecture, layout: Layout, rows: int) -> int:
    if not a.qk_norm:
        return 0
    query, key_value, _ = _widths(a, layout)
    heads = (a.num_heads + a.num_kv_heads) // layout.tensor
    fp32 = _FP32 if layout.spec == "torch" else 0
    return rows * (heads * _FP32 + (query + key_value) * (fp32 + layout.value_bytes))


def _widths(a: Architecture, layout: Layout) -> tuple[int, int, int]:
    """This rank's columns of query, of key (or value), and of the FFN."""
    return (
        a.num_heads * a.head_dim // layout.tensor,
        a.num_kv_heads * a.head_dim // layout.tensor,
        a.ffn_size // layout.tensor,
    )


def stage_bytes(architecture: Architecture, layout: Layout, stage: int, rows: int) -> int:
    """Bytes that one micro-batch of `rows` tokens keeps on a stage between its forward and its backward pass."""
    hidden = rows // layout.sequence_ranks * architecture.hidden_size
    layers = architecture.num_layers // layout.pipeline
    per_layer = hidden * layout.value_bytes if layout.recompute else layer_bytes(architecture, layout, rows)
    total = layers * per_layer
    if stage == 0:  # the tokens' ids, and which of them are another rank's
        total += rows * (_INT64 + (1 if layout.tensor > 1 else 0))
    return total + _final_norm(architecture, layout, stage, rows)


def _final_norm(architecture: Architecture, layout: Layout, stage: int, rows: int) -> int:
    if stage < layout.pipeline - 1:
        return 0
    own, fp32 = rows // layout.sequence_ranks, _FP32 if layout.spec == "torch" else 0
    return own * (_FP32 + architecture.hidden_size * (fp32 + layout.value_bytes))


def recomputed_bytes(architecture: Architecture, layout: Layout, stage: int, rows: int) -> int:
    """What recomputing a layer adds to the peak: its tensors, less those of the final norm, which are gone by then."""
    if not layout.recompute:
        return 0
    return max(0, layer_bytes(architecture, layout, rows) - _final_norm(architecture, layout, stage, rows))


def in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Micro-batches that 1F1B holds on a stage at its worst."""
    return min(micro_batches, layout.pipeline - stage)


def pipeline_input_bytes(architecture: Architecture, layout: Layout, stage: int, rows: int) -> int:
    """What a stage received of one micro-batch, kept until its gradient is sent back."""
    if stage == 0:
        return 0
    return rows // layout.sequence_ranks * architecture.hidden_size * layout.value_bytes


def head_chunk_bytes(architecture: Architecture, layout: Layout, shape: PackedShape, chunk: int) -> int:
    """Logits of one chunk, and fp32 scratch of the sweep over them (three buffers at most, without Triton)."""
    width = architecture.padded_vocab_size(layout.tensor) // layout.tensor
    chunk = min(chunk, shape.responses)
    return chunk * width * layout.value_bytes + 3 * min(_GPU_BLOCK_BYTES, chunk * width * _FP32)


def head_gradient_bytes(architecture: Architecture, layout: Layout, shape: PackedShape) -> int:
    """Gradients that the head's node holds: the head's, in fp32 and once more in the model's type, and the hidden
    states'; and the hidden states at the response rows."""
    hidden = 2 * shape.responses * architecture.hidden_size * layout.value_bytes
    return head_values(architecture, layout.tensor) * (_FP32 + layout.value_bytes) + hidden
