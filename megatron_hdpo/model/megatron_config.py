"""Megatron's configuration of a model, from its architecture, the layout and the recipe's model section."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hdpo.model.apex import installed_apex
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.config import ModelConfig
from megatron_hdpo.model.specs import SpecName
from megatron_hdpo.parallel.layout import ParallelConfig


def transformer_config(
    architecture: Architecture, layout: ParallelConfig, config: ModelConfig, spec: SpecName
) -> TransformerConfig:
    """Build Megatron's configuration of the model.

    This package normalises the losses itself, so gradients are plain sums over micro-batches and replicas
    (`calculate_per_token_loss`).
    """
    dtype = config.torch_dtype
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=spec == "transformer_engine",
        apply_rope_fusion=spec == "transformer_engine",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_stages if layout.virtual_stages > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.sequence,
        variable_seq_lengths=layout.pipeline > 1,
        overlap_p2p_comm=layout.virtual_stages > 1,
        batch_p2p_comm=layout.virtual_stages == 1,
        batch_p2p_sync=False,  # a wait for the GPU after every message, against a race in torch before 1.13
        deallocate_pipeline_outputs=True,
        calculate_per_token_loss=True,
        **_expert_settings(architecture, spec),
        **_recompute_settings(config),
        **_fp8_settings(config),
        # Weights come from a checkpoint: initialising them would cost time and, on a CPU, memory for the whole model
        # on every rank.
        perform_initialization=False,
        use_cpu_initialization=spec == "torch",
        # Transformer Engine's layers can add weight gradients to the fp32 accumulator themselves, but Megatron allows
        # the switch only if Apex's kernel is installed, which its own head needs.
        gradient_accumulation_fusion=spec == "transformer_engine" and installed_apex() == "whole",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )


def _recompute_settings(config: ModelConfig) -> dict[str, Any]:
    if config.recompute == "none":
        return {}
    if config.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(config.recompute_modules)}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _fp8_settings(config: ModelConfig) -> dict[str, Any]:
    """Return the FP8 settings; none without model.fp8.

    The weights stay bfloat16: Transformer Engine makes their FP8 copies at the first micro-batch of every pass, so
    weights that were swapped or updated since the last pass take effect.
    """
    if config.fp8 is None:
        return {}
    start, end = config.first_last_layers_bf16
    return {
        "fp8": config.fp8,
        "fp8_recipe": config.fp8_recipe,
        "first_last_layers_bf16": start + end > 0,
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
    }


def _expert_settings(architecture: Architecture, spec: SpecName) -> dict[str, Any]:
    """Return the settings of the experts: no token is dropped, and no auxiliary loss balances the load.

    The router is already trained; its gradient comes from the task's loss only.
    """
    # all-to-all is the only token dispatcher that Megatron allows together with variable sequence lengths.
    settings: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}
    if architecture.num_experts:
        settings |= {
            "num_moe_experts": architecture.num_experts,
            "moe_router_topk": architecture.experts_per_token,
            "moe_ffn_hidden_size": architecture.expert_ffn_size,
            # A softmax over the chosen experts equals the softmax over all experts, normalised on the chosen ones.
            "moe_router_pre_softmax": not architecture.normalised_routing,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "moe_grouped_gemm": spec == "transformer_engine",
        }
    return settings
