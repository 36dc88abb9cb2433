"""Architectures from a Hugging Face folder, or from a small table of well-known shapes."""

from __future__ import annotations

from pathlib import Path

from megatron_hdpo.costs.errors import PlanError
from megatron_hdpo.model.architecture import Architecture, ArchitectureError, read_architecture


def _qwen(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> Architecture:
    return Architecture(
        family="qwen2",
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        vocab_size=vocab,
        max_positions=32768,
        norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        qkv_bias=True,
        qk_norm=False,
        tied=tied,
    )


def _qwen3_moe(layers: int, hidden: int, heads: int, ffn: int, expert_ffn: int) -> Architecture:
    return Architecture(
        family="qwen3_moe",
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=heads,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=151936,
        max_positions=40960,
        norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        qkv_bias=False,
        qk_norm=True,
        tied=False,
        num_experts=128,
        experts_per_token=8,
        expert_ffn_size=expert_ffn,
    )


# The numbers of the models' published config.json files.
SHAPES = {
    "qwen2.5-1.5b": _qwen(layers=28, hidden=1536, ffn=8960, heads=12, kv_heads=2, vocab=151936, tied=True),
    "qwen2.5-7b": _qwen(layers=28, hidden=3584, ffn=18944, heads=28, kv_heads=4, vocab=152064, tied=False),
    "qwen2.5-32b": _qwen(layers=64, hidden=5120, ffn=27648, heads=40, kv_heads=8, vocab=152064, tied=False),
    "qwen2.5-72b": _qwen(layers=80, hidden=8192, ffn=29568, heads=64, kv_heads=8, vocab=152064, tied=False),
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 32, 6144, 768),
    "qwen3-235b-a22b": _qwen3_moe(94, 4096, 64, 12288, 1536),
}


def architecture_of(model: str) -> Architecture:
    """Return the architecture of a name of the table or of a Hugging Face folder. Raises PlanError."""
    name = model.lower()
    if name in SHAPES:
        return SHAPES[name]
    path = Path(model)
    if not (path / "config.json").is_file():
        raise PlanError(
            f"model {model}: neither a folder with a config.json nor one of {', '.join(SHAPES)}; name one with --model"
        )
    try:
        return read_architecture(path)
    except ArchitectureError as error:
        raise PlanError(str(error)) from error
