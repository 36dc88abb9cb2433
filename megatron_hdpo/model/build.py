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
from torch import nn

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.chunks import ModelChunks, chunks_of
from megatron_hdpo.model.config import ModelConfig, choose_spec
from megatron_hdpo.model.megatron_config import transformer_config
from megatron_hdpo.model.network import HeadlessGPTModel
from megatron_hdpo.model.specs import layer_spec
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.parallel.layout import check_layout


def build_model(architecture: Architecture, context: ParallelContext, config: ModelConfig) -> Any:
    """This rank's shard of the model on the run's device; its weights are undefined until they are loaded. A
    HeadlessGPTModel, or ModelChunks of them where parallel.virtual_stages says so.

    Raises LayoutError when the layout does not divide the model.
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


def wrap_data_parallel(model: nn.Module, context: ParallelContext, *, overlap_grad_reduce: bool = False) -> Any:
    """Megatron's DDP with fp32 gradients, laid out for the distributed optimizer; of each chunk where there are
    several."""
    wrapped = [_wrap_chunk(chunk, context, overlap_grad_reduce) for chunk in chunks_of(model)]
    return ModelChunks(wrapped) if isinstance(model, ModelChunks) else wrapped[0]


def _wrap_chunk(
    model: HeadlessGPTModel, context: ParallelContext, overlap_grad_reduce: bool
) -> DistributedDataParallel:
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
