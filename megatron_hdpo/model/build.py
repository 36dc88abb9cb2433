"""GPTModel from an Architecture, and its distributed data parallel wrapper."""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import nn

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.chunks import ModelChunks, chunks_of
from megatron_hdpo.model.config import ModelConfig, ModelError, choose_spec
from megatron_hdpo.model.megatron_config import transformer_config
from megatron_hdpo.model.network import HeadlessGPTModel
from megatron_hdpo.model.overlap import connect, overlaps
from megatron_hdpo.model.precision import runtime_error
from megatron_hdpo.model.specs import layer_spec
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.parallel.layout import ParallelConfig, check_layout


def build_model(architecture: Architecture, context: ParallelContext, config: ModelConfig) -> Any:
    """This rank's shard of the model on the run's device; its weights are undefined until they are loaded. A
    HeadlessGPTModel, or ModelChunks of them where parallel.virtual_stages says so.

    Raises LayoutError when the layout does not divide the model, ModelError when its precision cannot be had here.
    """
    layout = context.layout
    check_layout(layout, architecture.sizes, context.world_size)
    if layout.virtual_stages == 1:
        return _build_chunk(architecture, context, config, None)
    return ModelChunks([_build_chunk(architecture, context, config, c) for c in range(layout.virtual_stages)])


def _build_chunk(
    architecture: Architecture, context: ParallelContext, config: ModelConfig, chunk: int | None
) -> HeadlessGPTModel:
    layout = context.layout
    spec = choose_spec(config, context.device)
    if reason := runtime_error(config, spec, context.device):
        raise ModelError(reason)
    last = layout.virtual_stages - 1
    with context.megatron_calls():
        megatron_config = transformer_config(architecture, layout, config, spec)
        model = HeadlessGPTModel(
            config=megatron_config,
            transformer_layer_spec=layer_spec(spec, megatron_config, chunk),
            vocab_size=architecture.padded_vocab_size(layout.tensor),
            max_sequence_length=config.max_sequence or architecture.max_positions,
            pre_process=context.is_first_stage and chunk in (None, 0),
            post_process=context.is_last_stage and chunk in (None, last),
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            rope_scaling=architecture.rope_scaling is not None,
            rope_scaling_factor=architecture.rope_scaling or 1.0,
            pg_collection=context.groups,
            vp_stage=chunk,
        )
    _mark_shards(model)
    _mark_experts(model, layout)
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


def _mark_experts(model: HeadlessGPTModel, layout: ParallelConfig) -> None:
    """Have the gradients of experts added up over the ranks that hold copies of them.

    Megatron asks for that where expert-parallel ranks share them. Without these the ranks of an expert may still be
    others than the tensor-parallel ones: it would add up too few of their gradients.
    """
    for layer in (module for module in model.modules() if isinstance(module, MoELayer)):
        for parameter in layer.experts.parameters():
            parameter.allreduce = layout.expert == 1 and layout.expert_tensor == layout.tensor


def wrap_data_parallel(model: nn.Module, context: ParallelContext) -> Any:
    """Megatron's DDP with fp32 gradients, laid out for the distributed optimizer; of each chunk where there are
    several. parallel.overlap: see model/overlap.py."""
    overlap = overlaps(context)
    wrapped = [_wrap_chunk(chunk, context, overlap, first=c == 0) for c, chunk in enumerate(chunks_of(model))]
    if overlap:
        connect(wrapped)
    return ModelChunks(wrapped) if isinstance(model, ModelChunks) else wrapped[0]


def _wrap_chunk(
    model: HeadlessGPTModel, context: ParallelContext, overlap: bool, first: bool
) -> DistributedDataParallel:
    with context.megatron_calls():
        return DistributedDataParallel(
            config=model.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=overlap,
                overlap_param_gather=overlap,
                check_for_nan_in_grad=False,
            ),
            module=model,
            # Later chunks have others to compute beside: one bucket each, as Megatron's own training does.
            disable_bucketing=not first,
            pg_collection=context.groups,
        )
