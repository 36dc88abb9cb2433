"""Parameters of a rank, and their layout in Megatron's buffers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.model.architecture import Architecture

# megatron.core.distributed.param_and_grad_buffer: parameters begin at multiples of 64 values, buckets end at multiples
# of lcm(data-parallel ranks, 128).
_PARAMETER_STEP = 64
_BUCKET_STEP = 128
# megatron.core.distributed.distributed_data_parallel: a bucket is full at 40 million values, at 1 million per replica
# if that is more.
_FULL_BUCKET, _FULL_BUCKET_PER_REPLICA = 40_000_000, 1_000_000


@dataclass(frozen=True)
class Buffer:
    """Parameters of one chunk of layers that the same ranks share.

    group: those ranks. values: of all parameters, without padding. buckets: the values of each bucket, which is reduced
    in one call; its parameters are aligned, its end is not padded.
    """

    group: str
    values: int
    buckets: tuple[int, ...]

    @classmethod
    def of(cls, group: str, parameters: Sequence[int], full: int | None, *, alone: int | None = None) -> Buffer:
        """Cut parameters, in the model's order, into buckets as Megatron does: from the last one to the first.

        full: a bucket with so many values is full; None: one bucket takes all. alone: index of the parameter that has
        a bucket of its own.
        """
        buckets, filled = [], 0
        for index in range(len(parameters) - 1, -1, -1):
            if index == alone and filled:
                buckets.append(filled)
                filled = 0
            end = filled + parameters[index]
            filled = _rounded(end, _PARAMETER_STEP)
            if index == alone or (full is not None and end >= full):
                buckets.append(filled)
                filled = 0
        return cls(group, sum(parameters), (*buckets, filled) if filled else tuple(buckets))

    def bucket_values(self, layout: Layout) -> tuple[int, ...]:
        """Return the number of values of each bucket, padding included."""
        step = math.lcm(layout.ranks(self.group), _BUCKET_STEP)
        return tuple(_rounded(values, step) for values in self.buckets)


def _rounded(values: int, step: int) -> int:
    return -(-values // step) * step


@dataclass(frozen=True)
class StageParameters:
    """Parameters that one rank of a pipeline stage holds."""

    buffers: tuple[Buffer, ...]

    @property
    def values(self) -> int:
        """Return the number of values without padding."""
        return sum(buffer.values for buffer in self.buffers)

    def buffer_values(self, layout: Layout) -> int:
        """Return the values of the weight buffers, padding included; the gradient buffers have as many."""
        return sum(sum(buffer.bucket_values(layout)) for buffer in self.buffers)

    def shard_values(self, layout: Layout) -> float:
        """Return the number of values whose optimizer state this rank holds, on average."""
        return sum(buffer.values / layout.ranks(buffer.group) for buffer in self.buffers)


def attention_matrices(architecture: Architecture, tensor: int) -> tuple[int, int]:
    """Return the values of QKV and of the output projection of one layer on one tensor-parallel rank."""
    a, hidden = architecture, architecture.hidden_size
    query, key_value = a.num_heads * a.head_dim // tensor, a.num_kv_heads * a.head_dim // tensor
    return (query + 2 * key_value) * hidden, query * hidden


def expert_matrices(architecture: Architecture, layout: Layout) -> tuple[int, ...]:
    """Return the values of each expert matrix of one layer on one rank: gate and up, down, expert by expert."""
    if not architecture.num_experts:
        return ()
    one = architecture.expert_ffn_size // layout.expert_tensor * architecture.hidden_size
    return (2 * one, one) * (architecture.num_experts // layout.expert)


def shared_matrices(architecture: Architecture, tensor: int) -> tuple[int, ...]:
    """Return the values of each non-expert matrix of one layer on one tensor-parallel rank.

    QKV, projection, and the FFN's gate and up, down; or the router.
    """
    a = architecture
    ffn = a.ffn_size // tensor * a.hidden_size
    rest = (a.num_experts * a.hidden_size,) if a.num_experts else (2 * ffn, ffn)
    return (*attention_matrices(a, tensor), *rest)


def layer_vectors(architecture: Architecture, tensor: int) -> tuple[int, ...]:
    """Return the values of each norm and bias of one layer on one tensor-parallel rank."""
    a = architecture
    bias = ((a.num_heads + 2 * a.num_kv_heads) * a.head_dim // tensor,) if a.qkv_bias else ()
    return (a.hidden_size, a.hidden_size, *bias, *((a.head_dim, a.head_dim) if a.qk_norm else ()))


def head_values(architecture: Architecture, tensor: int) -> int:
    """Return the values of a rank's shard of the head or of the embedding: [padded vocabulary / TP, hidden]."""
    return architecture.padded_vocab_size(tensor) // tensor * architecture.hidden_size


def stage_parameters(architecture: Architecture, layout: Layout, stage: int) -> StageParameters:
    """Return the parameters of a rank of pipeline stage `stage`, chunk by chunk."""
    elsewhere = {"sequence": False, "recompute": False, "recomputed": (), "fp8": False, "offload": 0.0}
    return _stage_parameters(architecture, replace(layout, **elsewhere), stage)  # type: ignore[arg-type]


@lru_cache(maxsize=1024)  # a mixture has many experts, and a search repeats the same calls
def _stage_parameters(a: Architecture, layout: Layout, stage: int) -> StageParameters:
    chunks = range(layout.virtual_stages)
    return StageParameters(tuple(b for chunk in chunks for b in _chunk_buffers(a, layout, stage, chunk)))


def _chunk_buffers(a: Architecture, layout: Layout, stage: int, chunk: int) -> list[Buffer]:
    """Return the buffers of one chunk of layers.

    A tied embedding of a pipeline is on both ends, in a bucket of its own. Experts with a data-parallel group of their
    own have a buffer of their own.
    """
    first = stage == 0 and chunk == 0
    last = stage == layout.pipeline - 1 and chunk == layout.virtual_stages - 1
    layers = a.num_layers // (layout.pipeline * layout.virtual_stages)
    experts, embedding = _experts_in_order(a, layout), head_values(a, layout.tensor)
    whole = (*_layer_in_order(a, layout), *(() if layout.experts_apart else experts))
    parameters = [embedding] * first + [*whole] * layers + [a.hidden_size] * last
    copied = a.tied and layout.pipeline > 1
    if last and (copied or not a.tied):
        parameters.append(embedding)
    alone = None
    if copied and (first or last):
        alone = 0 if first else len(parameters) - 1
    full = _full_bucket(layout, stage, chunk)
    made = [Buffer.of("dp_cp", parameters, full, alone=alone)]
    if experts and layout.experts_apart:
        made.append(Buffer.of("expt_dp", experts * layers, full))
    return made


def _full_bucket(layout: Layout, stage: int, chunk: int) -> int | None:
    """Return the values of a full bucket; None where one bucket takes all.

    Buckets are for overlap, and only the first chunk of the first stage ends its backward pass with no other to hide
    the reduction behind.
    """
    if not layout.overlap or stage > 0 or chunk > 0:
        return None
    return max(_FULL_BUCKET, _FULL_BUCKET_PER_REPLICA * layout.data)


def _layer_in_order(a: Architecture, layout: Layout) -> tuple[int, ...]:
    """Return the values of one layer's parameters on one rank, without experts, in the order of the modules."""
    qkv, projection, *rest = shared_matrices(a, layout.tensor)
    before, after, *vectors = layer_vectors(a, layout.tensor)
    # Transformer Engine's product has the norm before it inside.
    attention = (before, projection, qkv) if layout.spec == "torch" else (projection, before, qkv)
    return (*attention, *vectors, after, *rest)


def _experts_in_order(a: Architecture, layout: Layout) -> tuple[int, ...]:
    """Return the values of one layer's expert matrices on one rank, in the order of the modules."""
    matrices = expert_matrices(a, layout)
    return matrices if layout.spec == "torch" else (*matrices[::2], *matrices[1::2])


def product_values(architecture: Architecture, layout: Layout) -> int:
    """Return the values of all matrices of one layer on one rank, its experts included."""
    return sum(shared_matrices(architecture, layout.tensor)) + sum(expert_matrices(architecture, layout))


def model_values(architecture: Architecture) -> int:
    """Return the number of parameters of the whole model, without padding of the vocabulary."""
    ends = 1 if architecture.tied else 2
    body = product_values(architecture, Layout()) + sum(layer_vectors(architecture, 1))
    return body * architecture.num_layers + architecture.hidden_size * (1 + ends * architecture.vocab_size)


def visited_values(architecture: Architecture, tokens: float) -> float:
    """Return the number of parameters, without the embedding, that a forward pass over `tokens` tokens reads.

    Of a mixture: the experts that at least one token visits, on average with a balanced router.
    """
    a = architecture
    values = float(model_values(a) - (0 if a.tied else a.vocab_size * a.hidden_size))
    if not a.num_experts:
        return values
    missed = (1.0 - a.experts_per_token / a.num_experts) ** tokens
    return values - missed * a.num_layers * sum(expert_matrices(a, Layout()))


def served_bytes(architecture: Architecture, values: float, fp8: bool) -> float:
    """Return the bytes of an engine's `values` parameters: all, or those that a step reads, the head included.

    Two bytes each; with FP8, one byte for each value of the layers' matrices.
    """
    a = architecture
    whole = float(model_values(a))
    others = whole - a.num_layers * product_values(a, Layout())
    if values < whole and not a.tied:
        others -= a.vocab_size * a.hidden_size  # the embedding, of which a step reads almost nothing
    return 2.0 * values - (values - others if fp8 else 0.0)


def norm_values(architecture: Architecture, layout: Layout, stage: int) -> int:
    """Return the values of gradients of norms and routers that tensor-parallel ranks sum after the backward pass.

    Each rank has the gradient of its own rows (sequence parallelism) or of its own heads (QK norms).
    """
    a = architecture
    layers = a.num_layers // layout.pipeline
    values = 2 * a.head_dim * layers if a.qk_norm else 0
    if layout.sequence:
        values += a.hidden_size * (2 * layers + int(stage == layout.pipeline - 1))
        values += a.num_experts * a.hidden_size * layers
    return values
