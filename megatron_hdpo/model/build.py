"""Construction of Megatron's GPTModel from an Architecture, and of its data-parallel wrapper."""

from __future__ import annotations

from functools import partial
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
from megatron_hdpo.model.fp8_rules import runtime_error
from megatron_hdpo.model.megatron_config import transformer_config
from megatron_hdpo.model.megatron_logs import leave_out_warnings_about_our_code
from megatron_hdpo.model.network import HeadlessGPTModel
from megatron_hdpo.model.overlap import connect, overlaps
from megatron_hdpo.model.specs import layer_spec
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.parallel.layout import ParallelConfig, check_layout


def build_model(architecture: Architecture, context: ParallelContext, config: ModelConfig) -> Any:
    """Build this rank's shard of the model on the run's device; its weights are undefined until they are loaded.

    Returns a HeadlessGPTModel, or ModelChunks of them if parallel.virtual_stages > 1.
    Raises LayoutError when the layout does not divide the model, ModelError when its precision does not run here.
    """
    leave_out_warnings_about_our_code()
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
            transformer_layer_spec=layer_spec(spec, megatron_config, config, chunk),
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
    _forget_routing(model)
    return model.to(context.device)


def _mark_shards(model: HeadlessGPTModel) -> None:
    """Mark the weights that are split over tensor-parallel ranks, as Megatron's initialisation (skipped here) does.

    The gradient norm treats a weight without the mark as a copy, and counts it on the first rank of the group only.
    """
    for module in model.modules():
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            continue
        dim = 1 if isinstance(module, RowParallelLinear) else 0
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def _mark_experts(model: HeadlessGPTModel, layout: ParallelConfig) -> None:
    """Mark the weights of experts: which ranks reduce their gradients, and that the gradient norm counts every part.

    Megatron reduces over the ranks that hold copies of an expert only if expert parallelism is used. Without it the
    expert group can still differ from the tensor-parallel group; Megatron would then reduce over too few ranks.

    A weight without the mark `tensor_model_parallel` is taken for a copy. Before 0.19.2, Megatron then counts it on the
    first rank of the tensor-parallel group of the other layers, and so omits the experts of the group's other ranks.
    Whether an expert's linear layer sets the mark depends on its kind, and on the versions.
    """
    for layer in (module for module in model.modules() if isinstance(module, MoELayer)):
        for parameter in layer.experts.parameters():
            parameter.allreduce = layout.expert == 1 and layout.expert_tensor == layout.tensor
            parameter.tensor_model_parallel = True


def _forget_routing(model: HeadlessGPTModel) -> None:
    """Let no dispatcher of tokens hold on to a layer's graph after its forward pass.

    Megatron's keeps the router's probabilities, of which it reads only the type, until the next forward pass. With
    recomputed layers the input and its gradient of every layer would stay: a gigabyte and a half of Qwen3-235B.
    """
    for layer in (module for module in model.modules() if isinstance(module, MoELayer)):
        layer.experts.register_forward_pre_hook(partial(_detach_probabilities, layer.token_dispatcher))


def _detach_probabilities(dispatcher: Any, *_: Any) -> None:
    dispatcher.probs = dispatcher.probs.detach()


def wrap_data_parallel(model: nn.Module, context: ParallelContext) -> Any:
    """Wrap a model in Megatron's DDP with fp32 gradients, laid out for the distributed optimizer.

    ModelChunks are wrapped chunk by chunk. Whether communication overlaps computation: see model/overlap.py.
    """
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
            # One bucket for each later chunk, as in Megatron's own training: other chunks compute meanwhile.
            disable_bucketing=not first,
            pg_collection=context.groups,
        )
