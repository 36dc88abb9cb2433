"""Parameters of a rank, and how Megatron lays them into buffers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.planner.layout import Layout

# megatron.core.distributed.param_and_grad_buffer: parameters begin at multiples of 64 values, buckets end at multiples
# of lcm(data-parallel ranks, 128).
_PARAMETER_STEP = 64
_BUCKET_STEP = 128


@dataclass(frozen=True)
class StageParameters:
    """Numbers of values of the parameters of one rank of a pipeline stage. buckets: groups that are reduced apart."""

    buckets: tuple[tuple[int, ...], ...]

    @property
    def values(self) -> int:
        """Without padding."""
        return sum(map(sum, self.buckets))

    def bucket_values(self, data: int) -> tuple[int, ...]:
        """Values of each bucket over `data` replicas, padding included."""
        return tuple(_padded(bucket, data) for bucket in self.buckets)

    def buffer_values(self, data: int) -> int:
        """Values of the buffer of weights, and of that of gradients, padding included."""
        return sum(self.bucket_values(data))


def _padded(bucket: tuple[int, ...], data: int) -> int:
    total = sum(-(-values // _PARAMETER_STEP) * _PARAMETER_STEP for values in bucket)
    step = math.lcm(data, _BUCKET_STEP)
    return -(-total // step) * step


def layer_matrices(architecture: Architecture, tensor: int) -> tuple[int, ...]:
    """Values of each matrix of one decoder layer on one tensor-parallel rank: QKV, projection, gate and up, down."""
    a, hidden = architecture, architecture.hidden_size
    query, key_value = a.num_heads * a.head_dim // tensor, a.num_kv_heads * a.head_dim // tensor
    ffn = a.ffn_size // tensor
    return (query + 2 * key_value) * hidden, query * hidden, 2 * ffn * hidden, ffn * hidden


def layer_vectors(architecture: Architecture, tensor: int) -> tuple[int, ...]:
    """Values of its norms and biases."""
    a = architecture
    bias = ((a.num_heads + 2 * a.num_kv_heads) * a.head_dim // tensor,) if a.qkv_bias else ()
    return (a.hidden_size, a.hidden_size, *bias, *((a.head_dim, a.head_dim) if a.qk_norm else ()))


def layer_parameters(architecture: Architecture, tensor: int) -> tuple[int, ...]:
    """Values of each parameter of one decoder layer on one tensor-parallel rank."""
    return (*layer_matrices(architecture, tensor), *layer_vectors(architecture, tensor))


def head_values(architecture: Architecture, tensor: int) -> int:
    """Values of this rank's shard of the head, and of the embedding: [padded vocabulary / TP, hidden]."""
    return architecture.padded_vocab_size(tensor) // tensor * architecture.hidden_size


def stage_parameters(architecture: Architecture, layout: Layout, stage: int) -> StageParameters:
    """Parameters of a rank of pipeline stage `stage`. A tied embedding of a pipeline lies on both ends, in a bucket of
    its own."""
    first, last = stage == 0, stage == layout.pipeline - 1
    body = list(layer_parameters(architecture, layout.tensor)) * (architecture.num_layers // layout.pipeline)
    body += [architecture.hidden_size] if last else []
    embedding = head_values(architecture, layout.tensor)
    if architecture.tied and layout.pipeline > 1 and (first or last):
        return StageParameters((tuple(body), (embedding,)))
    ends = int(first) + int(last and not architecture.tied)
    return StageParameters(((*body, *[embedding] * ends),))


def model_values(architecture: Architecture) -> int:
    """Parameters of the whole model, without padding of the vocabulary."""
    ends = 1 if architecture.tied else 2
    body = sum(layer_parameters(architecture, 1)) * architecture.num_layers
    return body + architecture.hidden_size * (1 + ends * architecture.vocab_size)


def norm_values(architecture: Architecture, layout: Layout, stage: int) -> int:
    """Values of the norms' gradients that tensor-parallel ranks add up after the backward pass: each rank saw its own
    rows (sequence parallelism) or its own heads (QK norms)."""
    layers = architecture.num_layers // layout.pipeline
    values = 2 * architecture.head_dim * layers if architecture.qk_norm else 0
    if layout.sequence:
        values += architecture.hidden_size * (2 * layers + int(stage == layout.pipeline - 1))
    return values
