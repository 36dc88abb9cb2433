"""Tiny random Hugging Face checkpoints of every architecture, and Megatron models of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from distributed_helper import leave_layout
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_hdpo.model.architecture import Architecture, read_architecture
from megatron_hdpo.model.build import build_model
from megatron_hdpo.model.config import ModelConfig
from megatron_hdpo.parallel.context import ParallelContext, start
from megatron_hdpo.parallel.layout import ParallelConfig

SIZES: dict[str, Any] = {
    "vocab_size": 499,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = {"max_position_embeddings": 16384}
CASES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama_tied_rope3": lambda: LlamaConfig(
        **SIZES | LONG, head_dim=32, tie_word_embeddings=True, rope_parameters=LLAMA3
    ),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen2_tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
    "qwen3_tied": lambda: Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}
EXPERTS: dict[str, Any] = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MOE_CASES: dict[str, Any] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES | EXPERTS, norm_topk_prob=True, tie_word_embeddings=False),
    "qwen3_moe_tied_raw": lambda: Qwen3MoeConfig(**SIZES | EXPERTS, norm_topk_prob=False, tie_word_embeddings=True),
}


def make_checkpoint(case: str, folder: Path, **save: Any) -> PreTrainedModel:
    """A model with random biases and norms too (at their defaults a mix-up would go unseen), saved under `folder`."""
    torch.manual_seed(sum(map(ord, case)))
    model = AutoModelForCausalLM.from_config((CASES | MOE_CASES)[case](), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if parameter.dim() == 1 else 0.15
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=scale)
    model.save_pretrained(folder, **save)
    return model.eval()


@contextmanager
def layout(tensor: int, pipeline: int, **kwargs: Any) -> Iterator[ParallelContext]:
    """Make Megatron's groups for one layout; the process group of all ranks stays for the next."""
    context = start(ParallelConfig(tensor=tensor, pipeline=pipeline, timeout_minutes=1.0, **kwargs), device="cpu")
    try:
        yield context
    finally:
        leave_layout()


def build(path: Path, context: ParallelContext, dtype: str = "float32") -> tuple[torch.nn.Module, Architecture]:
    """The unloaded Megatron model of a checkpoint; its weights are NaN, so that nothing is right by luck."""
    architecture = read_architecture(path)
    model = build_model(architecture, context, ModelConfig(path=str(path), dtype=dtype, spec="torch"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model, architecture
