"""Hugging Face checkpoints of tiny, randomly initialised models with a character tokenizer.

For the recipes that need no download (examples/digit_sums, examples/methods) and for tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_hdpo.types.disk import give_user_mode

CHARACTERS = "0123456789+=#"
FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}


def character_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character, and <pad>, <eos>, <unk>."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=4096
    )


def make_tiny_model(
    path: str | Path,
    *,
    family: str = "llama",
    layers: int = 4,
    hidden: int = 96,
    heads: int = 4,
    kv_heads: int = 4,
    ffn: int = 256,
    experts: int = 8,
    experts_per_token: int = 2,
    max_positions: int = 128,
    tied: bool = False,
    characters: str = CHARACTERS,
    seed: int = 0,
) -> Path:
    """Write config, weights and tokenizer into the folder `path`; the same arguments give the same weights.

    experts, experts_per_token: for the family qwen3_moe; each expert has `ffn` channels.
    """
    path = Path(path)
    tokenizer = character_tokenizer(characters)
    config = FAMILIES[family](
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **_expert_sizes(family, ffn, experts, experts_per_token),
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    tokenizer.save_pretrained(path)
    give_user_mode(path / "model.safetensors")
    return path


def _expert_sizes(family: str, ffn: int, experts: int, experts_per_token: int) -> dict[str, Any]:
    if family != "qwen3_moe":
        return {}
    return {
        "num_experts": experts,
        "num_experts_per_tok": experts_per_token,
        "moe_intermediate_size": ffn,
        "norm_topk_prob": True,
    }
