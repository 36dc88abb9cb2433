"""GPTModel from an Architecture: Megatron's configuration, the model, and its distributed data parallel wrapper."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.network import HeadlessGPTModel
from megatron_hdpo.model.specs import SpecName, layer_spec, transformer_engine_available
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.parallel.layout import ParallelConfig, check_layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModelConfig(BaseModel):
    """Which model is trained, and in what precision."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    path: str = Field(description="Hugging Face checkpoint folder: config.json, safetensors, tokenizer.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Type of weights and activations; main weights and gradients are fp32 either way."
    )
    spec: Literal["auto", "transformer_engine", "torch"] = Field(
        "auto",
        description="Layer spec; auto takes Transformer Engine on a GPU where it is installed, else plain torch.",
    )
    recompute: bool = Field(False, description="Recompute every layer's activations in the backward pass.")
    max_sequence: int | None = Field(
        None, ge=2, description="Longest sequence (prompt plus response); default: the model's own maximum."
    )


class ModelError(ValueError):
    """A model section of the recipe that cannot be built here."""


def choose_spec(config: ModelConfig, device: torch.device) -> SpecName:
    """The layer spec of this run. Raises ModelError when Transformer Engine is asked for and cannot run."""
    available = device.type == "cuda" and transformer_engine_available()
    if config.spec == "auto":
        return "transformer_engine" if available else "torch"
    if config.spec == "transformer_engine" and not available:
        raise ModelError("model.spec=transformer_engine needs a GPU and the transformer-engine package: use spec=torch")
    return config.spec


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
        sequence_parallel=layout.sequence,
        variable_seq_lengths=layout.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # the only one that Megatron admits beside variable lengths; unused here
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


def build_model(architecture: Architecture, context: ParallelContext, config: ModelConfig) -> HeadlessGPTModel:
    """This rank's shard of the model on the run's device; its weights are undefined until they are loaded.

    Raises LayoutError when the layout does not divide the model.
    """
    layout = context.layout
    check_layout(
        layout,
        world_size=context.world_size,
        num_layers=architecture.num_layers,
        num_heads=architecture.num_heads,
        num_kv_heads=architecture.num_kv_heads,
        ffn_size=architecture.ffn_size,
    )
    spec = choose_spec(config, context.device)
    with context.megatron_calls():
        megatron_config = transformer_config(architecture, layout, config, spec)
        model = HeadlessGPTModel(
            config=megatron_config,
            transformer_layer_spec=layer_spec(spec, megatron_config),
            vocab_size=architecture.padded_vocab_size(layout.tensor),
            max_sequence_length=config.max_sequence or architecture.max_positions,
            pre_process=context.is_first_stage,
            post_process=context.is_last_stage,
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            rope_scaling=architecture.rope_scaling is not None,
            rope_scaling_factor=architecture.rope_scaling or 1.0,
            pg_collection=context.groups,
        )
    _mark_shards(model)
    return model.to(context.device)


def _mark_shards(model: HeadlessGPTModel) -> None:
    """Mark the weights that tensor-parallel ranks share, as the initialisation that is skipped here would have done.

    The gradient norm takes what is not marked for a copy, and counts it on the first rank of the group alone.
    """
    for module in model.modules():
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            continue
        dim = 1 if isinstance(module, RowParallelLinear) else 0
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def wrap_data_parallel(
    model: HeadlessGPTModel, context: ParallelContext, *, overlap_grad_reduce: bool = False
) -> DistributedDataParallel:
    """Megatron's DDP with fp32 gradients, laid out for the distributed optimizer."""
    with context.megatron_calls():
        return DistributedDataParallel(
            config=model.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=overlap_grad_reduce,
                check_for_nan_in_grad=False,
            ),
            module=model,
            pg_collection=context.groups,
        )
