"""The layers of a pipeline rank under the interleaved schedule: several chunks, each a model of its own.

Chunk c of pipeline rank p is virtual stage c x (pipeline ranks) + p: the stages go over all ranks once for each chunk.
A rank with one chunk has that chunk as its model, without ModelChunks around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class ModelChunks(nn.Module):
    """The chunks of one rank, in the order in which tokens pass them; each bare or under Megatron's DDP."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)

    @property
    def config(self) -> TransformerConfig:
        """Megatron's configuration, which the chunks share."""
        return self.chunks[0].config

    def head_weight(self) -> Tensor:
        """Return this rank's shard of the head, [V / tp, H]; last pipeline rank only."""
        return self.chunks[-1].head_weight()  # type: ignore[operator]

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return Megatron's sharded state dict of all chunks, under this module's parameter names."""
        return {
            f"chunks.{c}.{name}": value
            for c, chunk in enumerate(self.chunks)
            for name, value in chunk.sharded_state_dict(*args, **kwargs).items()  # type: ignore[operator]
        }


def chunks_of(model: nn.Module) -> list[Any]:
    """Return the chunks of a rank's model; a model without chunks is returned as the only one."""
    return list(model.chunks) if isinstance(model, ModelChunks) else [model]


def unwrap(model: nn.Module) -> Any:
    """Return the model inside Megatron's DDP and precision wrappers, chunk by chunk; a bare model is returned as is."""
    if isinstance(model, ModelChunks):
        bare = [unwrap(chunk) for chunk in model.chunks]
        return model if all(a is b for a, b in zip(bare, model.chunks, strict=True)) else ModelChunks(bare)
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model
