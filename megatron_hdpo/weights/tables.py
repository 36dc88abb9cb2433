"""Tables of the Hugging Face tensors that make up each Megatron parameter, one table per architecture.

A parameter has two names if the two layer specs name it differently: Transformer Engine fuses a norm into the linear
layer that follows it, and keeps the experts of a rank in one module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_hdpo.model.architecture import Family

Split = Literal["copy", "rows", "columns", "vocabulary", "qkv", "gate_up"]
"""copy: every tensor-parallel rank holds the whole; rows, columns: equal ranges of dimension 0 or 1; vocabulary: rows,
with rows of zeros after the last token; qkv: per key-value group its query heads, key head, value head; gate_up: the
rank's rows of the gate, then its rows of the up projection. Parameters of experts are split over the ranks that share
one expert."""


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor of a table: its name, with `{layer}` and `{expert}` if it has them, and its dimensions.

    dims: names of sizes of the architecture (see `_tensors` in mapping.py).
    """

    name: str
    dims: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """One row of a table: the parameter's name under both layer specs, its split, and its source tensors.

    of_experts: the row repeats for every expert of a rank; `{expert}` is the local index in Megatron names and the
    global index in Hugging Face names.
    """

    torch_name: str
    engine_name: str
    split: Split
    sources: tuple[Source, ...]
    of_experts: bool = False


def _same(name: str, split: Split, *sources: Source) -> Rule:
    return Rule(name, name, split, sources)


def _block(name: str, *dims: str) -> Source:
    return Source("model.layers.{layer}." + name, dims)


EMBEDDING = _same(
    "embedding.word_embeddings.weight", "vocabulary", Source("model.embed_tokens.weight", ("vocab", "hidden"))
)
FINAL = (_same("decoder.final_layernorm.weight", "copy", Source("model.norm.weight", ("hidden",))),)
OUTPUT = _same("output_layer.weight", "vocabulary", Source("lm_head.weight", ("vocab", "hidden")))
_QKV = _same(
    "self_attention.linear_qkv.weight",
    "qkv",
    _block("self_attn.q_proj.weight", "query", "hidden"),
    _block("self_attn.k_proj.weight", "key", "hidden"),
    _block("self_attn.v_proj.weight", "key", "hidden"),
)
_QKV_BIAS = _same(
    "self_attention.linear_qkv.bias",
    "qkv",
    _block("self_attn.q_proj.bias", "query"),
    _block("self_attn.k_proj.bias", "key"),
    _block("self_attn.v_proj.bias", "key"),
)
_QK_NORM = (
    _same("self_attention.q_layernorm.weight", "copy", _block("self_attn.q_norm.weight", "head")),
    _same("self_attention.k_layernorm.weight", "copy", _block("self_attn.k_norm.weight", "head")),
)
_INPUT_NORM = Rule(
    "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "copy",
    (_block("input_layernorm.weight", "hidden"),),
)
_PROJECTION = _same(
    "self_attention.linear_proj.weight", "columns", _block("self_attn.o_proj.weight", "hidden", "query")
)
_EXPERT = "model.layers.{layer}.mlp.experts.{expert}."
_EXPERTS = (
    _same("pre_mlp_layernorm.weight", "copy", _block("post_attention_layernorm.weight", "hidden")),
    _same("mlp.router.weight", "copy", _block("mlp.gate.weight", "experts", "hidden")),
    Rule(
        "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        "mlp.experts.linear_fc1.weight{expert}",
        "gate_up",
        (
            Source(_EXPERT + "gate_proj.weight", ("expert_ffn", "hidden")),
            Source(_EXPERT + "up_proj.weight", ("expert_ffn", "hidden")),
        ),
        of_experts=True,
    ),
    Rule(
        "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        "mlp.experts.linear_fc2.weight{expert}",
        "columns",
        (Source(_EXPERT + "down_proj.weight", ("hidden", "expert_ffn")),),
        of_experts=True,
    ),
)
_MLP = (
    Rule(
        "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "copy",
        (_block("post_attention_layernorm.weight", "hidden"),),
    ),
    _same(
        "mlp.linear_fc1.weight",
        "gate_up",
        _block("mlp.gate_proj.weight", "ffn", "hidden"),
        _block("mlp.up_proj.weight", "ffn", "hidden"),
    ),
    _same("mlp.linear_fc2.weight", "columns", _block("mlp.down_proj.weight", "hidden", "ffn")),
)

LAYER_TABLES: dict[Family, tuple[Rule, ...]] = {
    "llama": (_INPUT_NORM, _QKV, _PROJECTION, *_MLP),
    "qwen2": (_INPUT_NORM, _QKV, _QKV_BIAS, _PROJECTION, *_MLP),
    "qwen3": (_INPUT_NORM, _QKV, *_QK_NORM, _PROJECTION, *_MLP),
    "qwen3_moe": (_INPUT_NORM, _QKV, *_QK_NORM, _PROJECTION, *_EXPERTS),
}
