"""The two layer specs of the model: Transformer Engine and plain torch."""

from __future__ import annotations

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import nn

from megatron_hdpo.model.attention import PackedAttention, PackedSelfAttention
from megatron_hdpo.model.config import ModelConfig, SpecName
from megatron_hdpo.model.fp8_linears import Linears, linears_of
from megatron_hdpo.model.rms_norm import RMSNorm


def layer_spec(
    name: SpecName, config: TransformerConfig, model: ModelConfig, chunk: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return the decoder spec for GPTModel.

    model: the recipe's section. chunk: index of the rank's chunk of layers under the interleaved schedule.

    The plain torch spec includes the final norm: Megatron's own choice depends on which optional packages can be
    imported (any package named apex breaks RMSNorm models there).
    """
    if name == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    first = get_transformer_layer_offset(config, chunk)
    numbers = range(first, first + get_num_layers_to_build(config, chunk))
    layers = [_torch_layer(config, linears_of(model, layer, config.num_layers)) for layer in numbers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def spec_of(model: nn.Module) -> SpecName:
    """Return the layer spec of a built model, by its parameters' names: in one of them norms are part of products."""
    fused = any(name.endswith("linear_qkv.layer_norm_weight") for name, _ in model.named_parameters())
    return "transformer_engine" if fused else "torch"


def _torch_layer(config: TransformerConfig, linears: Linears) -> ModuleSpec:
    head_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=PackedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linears.column,
            core_attention=PackedAttention,
            linear_proj=linears.row,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    products = MLPSubmodules(linear_fc1=linears.column, linear_fc2=linears.row)
    # From Megatron-Core 0.19 on, a layer takes a function that builds its MLP, and warns of a ModuleSpec of one.
    build_mlp = getattr(MLP, "as_mlp_submodule", None)
    mlp = partial(build_mlp, submodules=products) if build_mlp else ModuleSpec(module=MLP, submodules=products)
    # Checkpoints use the parameter names of the Transformer Engine spec, so that each spec loads those of the other.
    engine_names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if config.num_moe_experts:
        experts = ModuleSpec(module=SequentialMLP, submodules=products)
        mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))
    else:
        engine_names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=engine_names,
        ),
    )
