"""Other architectures through NVIDIA's Megatron-Bridge, where it is installed.

An optional adapter with the shape of this room's own functions. It was written from Megatron-Bridge's public sources
(`megatron.bridge.AutoBridge`: from_hf_pretrained, to_megatron_provider, load_hf_weights, export_hf_weights,
save_hf_pretrained) and HAS NOT BEEN RUN AGAINST IT: it imports Transformer Engine unconditionally, so it needs a GPU,
and its last release for Python 3.11 wants transformers < 5. Llama, Qwen2, Qwen3 and
Qwen3-MoE do not need it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_hdpo.model.chunks import unwrap
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.errors import WeightsError


class MegatronBridge:
    """A Hugging Face folder seen through Megatron-Bridge. All methods are collective over all ranks.

    Raises WeightsError when Megatron-Bridge cannot be imported or does not know the architecture.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            self._bridge = _auto_bridge().from_hf_pretrained(self.path)
        except ValueError as error:
            raise WeightsError(f"Megatron-Bridge cannot convert {path}: {error}") from error

    def build(self, context: ParallelContext, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """The unloaded model on the run's layout, with Megatron-Bridge's own configuration of the architecture."""
        provider = self._bridge.to_megatron_provider(load_weights=False)
        provider.tensor_model_parallel_size = context.layout.tensor
        provider.pipeline_model_parallel_size = context.layout.pipeline
        provider.sequence_parallel = context.layout.sequence
        provider.params_dtype = provider.pipeline_dtype = dtype
        provider.finalize()
        (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
        return unwrap(model)

    def load(self, model: nn.Module) -> None:
        """Fill the model's parameters from the folder."""
        self._bridge.load_hf_weights([unwrap(model)], self.path)

    def stream(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor) on every rank, in Megatron-Bridge's order."""
        yield from self._bridge.export_hf_weights([unwrap(model)], cpu=False, show_progress=False)

    def save(self, model: nn.Module, out_path: str | Path) -> None:
        """A Hugging Face folder with weights, config and tokenizer."""
        self._bridge.save_hf_pretrained([unwrap(model)], str(out_path), show_progress=False)


def _auto_bridge() -> Any:
    try:
        return importlib.import_module("megatron.bridge").AutoBridge
    except (ImportError, RuntimeError) as error:  # an incomplete Transformer Engine raises RuntimeError
        raise WeightsError(
            f"this architecture needs Megatron-Bridge, which cannot be imported ({error}); install megatron-bridge and "
            "Transformer Engine on a GPU machine, or take a Llama, Qwen2, Qwen3 or Qwen3-MoE model"
        ) from error
