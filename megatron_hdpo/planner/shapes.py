"""Architectures: from a Hugging Face folder, or from a small table of well-known shapes."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_hdpo.model.architecture import Architecture, ArchitectureError, read_architecture
from megatron_hdpo.planner.errors import PlanError


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


# The numbers of the models' published config.json files.
SHAPES = {
    "qwen2.5-1.5b": _qwen(28, 1536, 8960, 12, 2, 151936, True),
    "qwen2.5-7b": _qwen(28, 3584, 18944, 28, 4, 152064, False),
    "qwen2.5-32b": _qwen(64, 5120, 27648, 40, 8, 152064, False),
    "qwen2.5-72b": _qwen(80, 8192, 29568, 64, 8, 152064, False),
}
_MIXTURES = ("qwen3-235b-a22b", "qwen3-30b-a3b", "deepseek-v3")
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
NO_EXPERTS = (
    "is a mixture of experts: the trainer has no expert parallelism yet, so a plan of it would be of nothing that runs"
)


def architecture_of(model: str) -> Architecture:
    """The architecture of a name of the table or of a Hugging Face folder. Raises PlanError."""
    name = model.lower()
    if name in SHAPES:
        return SHAPES[name]
    if name in _MIXTURES:
        raise PlanError(f"model {model} {NO_EXPERTS}")
    path = Path(model)
    if not (path / "config.json").is_file():
        raise PlanError(
            f"model {model}: neither a folder with a config.json nor one of {', '.join(SHAPES)}; name one with --model"
        )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanError(f"{path / 'config.json'} is not JSON: {error}") from error
    if isinstance(config, dict) and any(config.get(key) for key in _EXPERT_KEYS):
        raise PlanError(f"{path / 'config.json'} {NO_EXPERTS}")
    try:
        return read_architecture(path)
    except ArchitectureError as error:
        raise PlanError(str(error)) from error
