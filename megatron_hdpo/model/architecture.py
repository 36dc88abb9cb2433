"""The architecture of a decoder, read from a Hugging Face `config.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_hdpo.model.config_values import ConfigValues
from megatron_hdpo.model.rope_settings import rope_settings
from megatron_hdpo.parallel.layout import ModelSizes
from megatron_hdpo.types.errors import UserError

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe"]


class ArchitectureError(UserError, ValueError):
    """A model that this package cannot build; the text names the key of its config.json that is the reason."""


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a decoder-only model.

    vocab_size is the real vocabulary; rows that a tensor-parallel layout pads onto it carry no probability.
    rope_scaling is Llama 3's factor, or None. A model with experts (num_experts > 0) has them in every layer, each with
    expert_ffn_size channels; each token passes experts_per_token of them, and with normalised_routing their softmax
    weights are normalised to sum to 1.
    """

    family: Family
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: float | None
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    normalised_routing: bool = True

    @property
    def sizes(self) -> ModelSizes:
        """The sizes that a parallel layout must divide."""
        return ModelSizes(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            ffn_size=self.ffn_size,
            num_experts=self.num_experts,
            expert_ffn_size=self.expert_ffn_size,
        )

    def padded_vocab_size(self, tensor_parallel: int, multiple: int = 128) -> int:
        """Return the rows of the embedding over all shards: the vocabulary rounded up so that all shards are equal.

        Each shard is a multiple of `multiple` rows, as in Megatron.
        """
        step = multiple * tensor_parallel
        return -(-self.vocab_size // step) * step


_FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}


def read_architecture(model_path: str | Path) -> Architecture:
    """Read the architecture of a Hugging Face checkpoint folder; raises ArchitectureError if it is not supported."""
    path = Path(model_path) / "config.json"
    if not path.is_file():
        raise ArchitectureError(
            f"{path} does not exist: model.path must be a Hugging Face checkpoint folder, or a model of the hub that "
            "`megatron_hdpo prepare` has downloaded"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArchitectureError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise ArchitectureError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(config, dict):
        raise ArchitectureError(f"{path} must hold an object, not {type(config).__name__}")
    try:
        return parse_architecture(config, str(path))
    except KeyError as error:
        raise ArchitectureError(f"{path} lacks the key {error}") from error


def parse_architecture(config: dict[str, Any], origin: str = "config.json") -> Architecture:
    """Build an Architecture from the parsed config.json of transformers 4 or 5.

    origin: name of the file in errors. Raises ArchitectureError on a model that is not supported, KeyError on a key
    that is missing.
    """

    def refuse(reason: str) -> ArchitectureError:
        return ArchitectureError(f"{origin}: {reason}")

    values = ConfigValues(config, refuse)
    name = (values.names("architectures") or ["(none)"])[0]
    family = _FAMILIES.get(name)
    if family is None:
        raise refuse(f"architectures={name} is not supported; supported: {', '.join(_FAMILIES)}")
    if config.get("hidden_act", "silu") != "silu":
        raise refuse(f"hidden_act={config['hidden_act']} is not supported; supported: silu")
    if values.flag("mlp_bias"):
        raise refuse("mlp_bias=true is not supported")
    if values.flag("use_sliding_window") or "sliding_attention" in values.names("layer_types"):
        raise refuse("sliding-window attention is not supported")
    if family != "qwen2" and values.flag("attention_bias"):
        raise refuse("attention_bias=true is not supported: it would put a bias on the attention output too")
    hidden, heads = values.size("hidden_size"), values.size("num_attention_heads")
    kv_heads = values.size_or("num_key_value_heads", heads)
    if heads % kv_heads:
        raise refuse(f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}")
    if config.get("head_dim") is None and hidden % heads:
        raise refuse(f"hidden_size={hidden} is no multiple of num_attention_heads={heads}, and head_dim is missing")
    rope_theta, rope_scaling = rope_settings(values)
    return Architecture(
        family=family,
        num_layers=values.size("num_hidden_layers"),
        hidden_size=hidden,
        ffn_size=values.size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=values.size_or("head_dim", hidden // heads),
        vocab_size=values.size("vocab_size"),
        max_positions=values.size("max_position_embeddings"),
        norm_eps=values.positive("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        tied=values.flag("tie_word_embeddings"),
        **(_experts(values) if family == "qwen3_moe" else {}),
    )


def _experts(values: ConfigValues) -> dict[str, Any]:
    """Read the sizes of the experts; only models with experts in every layer, and no shared experts, are supported."""
    config, refuse = values.config, values.refuse
    if values.size_or("decoder_sparse_step", 1) != 1:
        raise refuse(f"decoder_sparse_step={config['decoder_sparse_step']} is not supported: every layer needs experts")
    if config.get("mlp_only_layers"):
        raise refuse(f"mlp_only_layers={config['mlp_only_layers']} is not supported: every layer needs experts")
    if config.get("shared_expert_intermediate_size") or config.get("n_shared_experts"):
        raise refuse("shared experts are not supported")
    # transformers 4 writes num_experts, 5 writes num_local_experts; 5 reads both, 4 only the first.
    count = values.size("num_experts" if "num_experts" in config else "num_local_experts")
    chosen, normalised = config["num_experts_per_tok"], values.flag("norm_topk_prob")
    if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 < chosen <= count:
        raise refuse(f"num_experts_per_tok={chosen} is not between 1 and the {count} experts")
    if chosen == 1 and normalised:
        raise refuse("num_experts_per_tok=1 with norm_topk_prob=true is not supported: the router has no gradient then")
    return {
        "num_experts": count,
        "experts_per_token": chosen,
        "expert_ffn_size": values.size("moe_intermediate_size"),
        "normalised_routing": normalised,
    }
