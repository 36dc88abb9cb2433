"""Model folders without weights: a config.json, and a reader whose tensors have the right shapes and no values."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_hdpo.model.architecture import Architecture, read_architecture
from megatron_hdpo.weights.hf_files import HfWeights
from megatron_hdpo.weights.mapping import tensors

_CLASSES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
}


def write_folder(architecture: Architecture, folder: Path) -> Path:
    """Write a folder whose config.json `read_architecture` reads as `architecture`, and return it."""
    a = architecture
    name, kind = _CLASSES[a.family]
    config = {
        "architectures": [name],
        "model_type": kind,
        "num_hidden_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_size,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "vocab_size": a.vocab_size,
        "max_position_embeddings": a.max_positions,
        "rms_norm_eps": a.norm_eps,
        "rope_theta": a.rope_theta,
        "tie_word_embeddings": a.tied,
        "hidden_act": "silu",
        "dtype": "bfloat16",
    }
    if a.rope_scaling is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": a.rope_scaling,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    if a.num_experts:
        config |= {
            "num_experts": a.num_experts,
            "num_experts_per_tok": a.experts_per_token,
            "moe_intermediate_size": a.expert_ffn_size,
            "norm_topk_prob": a.normalised_routing,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class UnwrittenWeights(HfWeights):
    """Reader of a folder that has a config.json and no weights: tensors of its shapes in memory that nobody wrote."""

    def __enter__(self) -> UnwrittenWeights:
        self._shapes = {tensor.name: tensor.shape for tensor in tensors(read_architecture(self.path))}
        self._file_of = dict.fromkeys(self._shapes)
        return self

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the full shape of a tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """Return BF16."""
        return "BF16"

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Return rows or columns start:stop of a tensor, of any values."""
        shape = list(self._shapes[name])
        shape[dim] = stop - start
        return torch.empty(shape, dtype=torch.bfloat16)
