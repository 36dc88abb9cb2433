"""Parameters of a rank, and their layout in Megatron's buffers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.model.architecture import Architecture

# megatron.core.distributed.param_and_grad_buffer: parameters begin at multiples of 64 values, buckets end at multiples
# of lcm(data-parallel ranks, 128).
_PARAMETER_STEP = 64
_BUCKET_STEP = 128


@dataclass(frozen=True)
class Buffer:
    """Parameters of one chunk of layers that the same ranks share.

    group: those ranks. buckets: what is reduced in one call; each is a tuple of (values of a parameter, number of such
    parameters).
    """

    group: str
    buckets: tuple[tuple[tuple[int, int], ...], ...]

    @cached_property
    def values(self) -> int:
        """Return the number of values without padding."""
        return sum(values * count for bucket in self.buckets for values, count in bucket)

    def bucket_values(self, layout: Layout) -> tuple[int, ...]:
        """Return the number of values of each bucket, padding included."""
        step = math.lcm(layout.ranks(self.group), _BUCKET_STEP)
        return tuple(-(-values // step) * step for values in self._aligned)

    @cached_property
    def _aligned(self) -> tuple[int, ...]:
        step = _PARAMETER_STEP
        return tuple(sum(-(-values // step) * step * count for values, count in bucket) for bucket in self.buckets)


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


@lru_cache(maxsize=1024)  # a mixture has many experts, and a search repeats the same calls
def stage_parameters(architecture: Architecture, layout: Layout, stage: int) -> StageParameters:
    """Return the parameters of a rank of pipeline stage `stage`, chunk by chunk."""
    chunks = range(layout.virtual_stages)
    return StageParameters(tuple(b for chunk in chunks for b in _chunk_buffers(architecture, layout, stage, chunk)))


def _chunk_buffers(a: Architecture, layout: Layout, stage: int, chunk: int) -> list[Buffer]:
    """Return the buffers of one chunk of layers.

    A tied embedding of a pipeline is on both ends, in a bucket of its own. Experts with a data-parallel group of their
    own have a buffer of their own.
    """
    first = stage == 0 and chunk == 0
    last = stage == layout.pipeline - 1 and chunk == layout.virtual_stages - 1
    layers = a.num_layers // (layout.pipeline * layout.virtual_stages)
    experts = expert_matrices(a, layout)
    own = [*shared_matrices(a, layout.tensor), *layer_vectors(a, layout.tensor)]
    own += [] if layout.experts_apart else experts
    body = _counted(own, layers) + ([(a.hidden_size, 1)] if last else [])
    embedding = head_values(a, layout.tensor)
    if a.tied and layout.pipeline > 1 and (first or last):
        made = [Buffer("dp_cp", (tuple(body), ((embedding, 1),)))]
    else:
        ends = int(first) + int(last and not a.tied)
        made = [Buffer("dp_cp", ((*body, (embedding, ends)),))]
    if experts and layout.experts_apart:
        made.append(Buffer("expt_dp", (tuple(_counted(experts, layers)),)))
    return made


def _counted(values: Sequence[int], layers: int) -> list[tuple[int, int]]:
    return [(value, count * layers) for value, count in Counter(values).items()]


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
