"""Policies whose network is Megatron's HybridModel, of the plain-torch spec's layers: Megatron-Core 0.19 and later.

A layer of GPTModel becomes two, of which each has its own norm: attention (`*`), then an MLP (`-`) or experts (`E`).
docs/hybrid-model.md is about the move from GPTModel to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_hdpo.model.architecture import Architecture, read_architecture
from megatron_hdpo.model.build import _mark_experts, _mark_shards, wrap_data_parallel
from megatron_hdpo.model.config import ModelConfig, OptimizerConfig
from megatron_hdpo.model.megatron_config import transformer_config
from megatron_hdpo.model.optimizer import build_optimizer
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.model.rms_norm import RMSNorm
from megatron_hdpo.model.specs import layer_spec
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.load import load_hf
from megatron_hdpo.weights.stream import stream_hf


class TorchStack(HybridStack):
    """A HybridStack that ends with the norm of the plain-torch spec: its own needs Transformer Engine."""

    def __init__(self, config: TransformerConfig, submodules: HybridStackSubmodules, **options: Any) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **options)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = RMSNorm(config, config.hidden_size, eps=config.layernorm_epsilon)


class HeadlessHybridModel(HybridModel):
    """A HybridModel whose last stage returns hidden states after the final norm, [rows / SP, 1, hidden].

    HybridModel has no `output_processor`: its head is replaced by one that returns what it gets.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.post_process:
            self.output_layer.forward = lambda hidden_states, **_: (hidden_states, None)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = super().forward(*args, **kwargs)
        return output.transpose(0, 1) if self.post_process else output  # HybridModel transposes the head's output

    def head_weight(self) -> Tensor:
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters by their names in a GPTModel of the same layers."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield gpt_name(name), parameter


def gpt_name(name: str) -> str:
    """The name in GPTModel of a parameter of a HybridModel whose layers come in pairs."""
    if name.startswith("decoder.layers."):
        layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
        return f"decoder.layers.{int(layer) // 2}.{rest}"
    return name.replace("decoder.final_norm.", "decoder.final_layernorm.")


class AsGptModel:
    """What loading and streaming read of a GPTModel, for a HybridModel: parameters by name, numbers of layers."""

    def __init__(self, model: HeadlessHybridModel) -> None:
        self.named_parameters = model.named_parameters
        attention = model.decoder.layers[::2]
        self.decoder = SimpleNamespace(
            layers=[SimpleNamespace(layer_number=(layer.layer_number + 1) // 2) for layer in attention]
        )


def build_hybrid_policy(
    path: Path, context: ParallelContext, *, budget: int = 40, optimizer: OptimizerConfig | None = None
) -> Policy:
    """The checkpoint as a policy on a HybridModel, its weights read through the tables for GPTModel."""
    architecture = read_architecture(path)
    model = _model(architecture, context)
    load_hf(AsGptModel(model), architecture, context, path)
    ddp = wrap_data_parallel(model, context)
    pair = (None, None) if optimizer is None else build_optimizer(optimizer, ddp, context, total_steps=10)
    return Policy(architecture, context, ddp, budget, *pair)


def hybrid_weights(policy: Policy) -> dict[str, np.ndarray]:
    """Full tensors by Hugging Face name, on every rank."""
    stream = stream_hf(AsGptModel(policy.model), policy.architecture, policy.context)
    return {name: value.float().numpy().copy() for name, value in stream}


def _model(architecture: Architecture, context: ParallelContext) -> HeadlessHybridModel:
    pairs = "*E" if architecture.num_experts else "*-"
    stages = context.layout.pipeline
    doubled = replace(architecture, num_layers=2 * architecture.num_layers)
    with context.megatron_calls():
        config = transformer_config(doubled, context.layout, ModelConfig(path="", dtype="float32"), "torch")
        model = HeadlessHybridModel(
            config=config,
            hybrid_stack_spec=_stack(config),
            vocab_size=architecture.padded_vocab_size(context.layout.tensor),
            max_sequence_length=architecture.max_positions,
            hybrid_layer_pattern="|".join([pairs * (architecture.num_layers // stages)] * stages),
            pre_process=context.is_first_stage,
            post_process=context.is_last_stage,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            pg_collection=context.groups,
        )
        model.rotary_pos_emb = _rope(architecture, context)
    _mark_shards(model)
    _mark_experts(model, context.layout)
    return model


def _rope(architecture: Architecture, context: ParallelContext) -> RotaryEmbedding:
    """HybridModel's own cannot be told to scale the frequencies as Llama 3 does."""
    return RotaryEmbedding(
        kv_channels=architecture.head_dim,
        rotary_percent=1.0,
        rotary_base=architecture.rope_theta,
        rope_scaling=architecture.rope_scaling is not None,
        rope_scaling_factor=architecture.rope_scaling or 1.0,
        use_cpu_initialization=True,
        cp_group=context.groups.cp,
    )


def _stack(config: TransformerConfig) -> ModuleSpec:
    """The halves of a layer of the plain-torch spec."""
    layer: TransformerLayerSubmodules = layer_spec("torch", config, ModelConfig(path="")).layer_specs[0].submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=layer.input_layernorm, self_attention=layer.self_attention, self_attn_bda=layer.self_attn_bda
    )
    mlp = TransformerLayerSubmodules(pre_mlp_layernorm=layer.pre_mlp_layernorm, mlp=layer.mlp, mlp_bda=layer.mlp_bda)
    return ModuleSpec(
        module=TorchStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
            moe_layer=ModuleSpec(module=TransformerLayer, submodules=mlp),
        ),
    )
