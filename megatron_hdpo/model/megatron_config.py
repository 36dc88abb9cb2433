"""Megatron's configuration of a model, from its architecture, the layout and the recipe's model section."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.config import DTYPES, ModelConfig
from megatron_hdpo.model.specs import SpecName
from megatron_hdpo.parallel.layout import ParallelConfig


def transformer_config(
    architecture: Architecture, layout: ParallelConfig, config: ModelConfig, spec: SpecName
) -> TransformerConfig:
    """Megatron's configuration of the model. Losses are normalised by this package, so gradients are plain sums
    over micro-batches and replicas (`calculate_per_token_loss`)."""
    dtype = DTYPES[config.dtype]
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
        moe_token_dispatcher_type="alltoall",  # the only one that Megatron admits beside variable lengths
        deallocate_pipeline_outputs=True,
        calculate_per_token_loss=True,
        recompute_granularity="full" if config.recompute else None,
        recompute_method="uniform" if config.recompute else None,
        recompute_num_layers=1 if config.recompute else None,
        # Weights come from a checkpoint: initialising them would cost time and, on a CPU, the whole model per rank.
        perform_initialization=False,
        use_cpu_initialization=spec == "torch",
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )
