"""FP8 by Transformer Engine: what a recipe may combine, and what it asks of shapes and devices.

Only the matrix products of the transformer layers run in FP8. Embedding and head belong to Megatron's own modules,
which have none; log-probs and divergences are computed here, in float32. Nothing of FP8 has run where this was written:
the rules are those of megatron-core 0.16.1 and Transformer Engine 2.11, read in their sources.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.config import ModelConfig
from megatron_hdpo.model.specs import SpecName
from megatron_hdpo.parallel.layout import ParallelConfig

# Compute capability: the least that runs a recipe, and the first that does not (Transformer Engine 2.11).
_CAPABILITIES = {
    "delayed": ((8, 9), None, "Ada or Hopper"),
    "tensorwise": ((8, 9), None, "Ada or Hopper"),
    "blockwise": ((9, 0), None, "Hopper, with CUDA 12.9"),
    "mxfp8": ((10, 0), (12, 0), "Blackwell (B200); H100 and H200 have none"),
}


def alignment(config: ModelConfig | TransformerConfig) -> int:
    """What the dimensions of every FP8 matrix product must be multiples of, rows included; 1 without FP8."""
    if config.fp8 is None:
        return 1
    return 32 if config.fp8_recipe == "mxfp8" else 16


def precision_errors(config: ModelConfig, layout: ParallelConfig, architecture: Architecture) -> Iterator[str]:
    """Reasons why the recipe's precision cannot be, each beginning with its key."""
    if config.fp8_param:
        yield (
            "model.fp8_param: weights kept in FP8 alone are not supported: Megatron would make the fp32 main weights "
            "from what the layers were initialised with instead of the checkpoint's, teachers that rest on the host "
            "would not come back bit for bit, and with blockwise scales it is known to give NaN beyond TP 2. Leave it "
            "out: model.fp8 computes in FP8 from bfloat16 weights"
        )
    yield from _recompute_errors(config, architecture)
    if config.fp8 is None:
        if any(config.first_last_layers_bf16):
            yield "model.first_last_layers_bf16: all layers are bfloat16 without model.fp8"
        if config.fp8_recipe != ModelConfig.model_fields["fp8_recipe"].default:
            yield "model.fp8_recipe: there is no FP8 without model.fp8"
        return
    yield from _fp8_errors(config, layout, architecture)


def _recompute_errors(config: ModelConfig, architecture: Architecture) -> Iterator[str]:
    if config.recompute != "selective":
        if config.recompute_modules != ModelConfig.model_fields["recompute_modules"].default:
            yield "model.recompute_modules: they count with model.recompute=selective alone"
        return
    dense = not architecture.num_experts
    for name in config.recompute_modules:
        if dense and name == "moe":
            yield "model.recompute_modules: moe is for models with experts, this one is dense: use mlp"
        if not dense and name == "mlp":
            yield "model.recompute_modules: mlp is for dense models, this one has experts: use moe"
        if name == "layernorm" and (dense or config.spec == "torch"):
            yield (
                "model.recompute_modules: layernorm is for models with experts under Transformer Engine; in its dense "
                "layers norms are part of the products that follow, and plain torch layers cannot"
            )
    if config.fp8_recipe == "delayed" and config.fp8 is not None and "layernorm" in config.recompute_modules:
        yield "model.recompute_modules: layernorm cannot be recomputed with fp8_recipe=delayed"


def _fp8_errors(config: ModelConfig, layout: ParallelConfig, architecture: Architecture) -> Iterator[str]:
    if config.spec == "torch":
        yield "model.fp8: needs model.spec=transformer_engine; under plain torch layers it would do nothing"
    if config.dtype == "float32":
        yield "model.fp8: needs model.dtype=bfloat16, not float32"
    if config.fp8_recipe == "delayed" and any(config.first_last_layers_bf16):
        yield "model.first_last_layers_bf16: not with fp8_recipe=delayed, whose scales would miss reductions"
    per_stage = architecture.num_layers // layout.pipeline
    if max(config.first_last_layers_bf16) > per_stage:
        yield f"model.first_last_layers_bf16: at most the {per_stage} layers of a pipeline stage at either end"
    yield from size_errors(config, layout, architecture)


def size_errors(config: ModelConfig, layout: ParallelConfig, architecture: Architecture) -> Iterator[str]:
    """Sizes of a model, the policy's or a teacher's, that FP8 matrix products do not take."""
    step, tensor, sizes = alignment(config), layout.tensor, architecture.sizes
    heads = architecture.num_heads + 2 * architecture.num_kv_heads
    dimensions = {
        "hidden size": architecture.hidden_size,
        "query, key and value channels of a tensor-parallel rank": heads * architecture.head_dim // tensor,
        "attention channels of a tensor-parallel rank": architecture.num_heads * architecture.head_dim // tensor,
    }
    if sizes.num_experts:
        dimensions["expert channels of a rank"] = sizes.expert_ffn_size // layout.expert_tensor
    else:
        dimensions["FFN channels of a tensor-parallel rank"] = sizes.ffn_size // tensor
    for what, size in dimensions.items():
        if size % step:
            yield f"model.fp8: {size} {what} are no multiple of {step}, as FP8 matrix products need"


def runtime_error(config: ModelConfig, spec: SpecName, device: torch.device) -> str | None:
    """Why the recipe's precision cannot be had with the layers and on the device that this run has; None where it can
    be."""
    if spec == "torch" and config.recompute == "selective" and "layernorm" in config.recompute_modules:
        return "model.recompute_modules: layernorm needs Transformer Engine, and this run has plain torch layers"
    if config.fp8 is None:
        return None
    if spec == "torch":  # Megatron would silently compute in bfloat16
        return "model.fp8 needs Transformer Engine on a GPU, and this run has plain torch layers"
    least, beyond, known = _CAPABILITIES[config.fp8_recipe]
    found = torch.cuda.get_device_capability(device)
    if found < least or (beyond is not None and found >= beyond):
        name = torch.cuda.get_device_name(device)
        return (
            f"model.fp8_recipe={config.fp8_recipe} does not run on {name} (compute capability {found[0]}.{found[1]}): "
            f"it needs {least[0]}.{least[1]}, {known}"
        )
    return None


def precision_warnings(config: ModelConfig) -> Iterator[str]:
    """What deserves a word before the device is known."""
    if config.fp8 is not None and config.fp8_recipe == "mxfp8":
        yield "model.fp8_recipe=mxfp8 runs on Blackwell alone: on H100 and H200 the run stops when it starts"
    if config.fp8 is not None and config.fp8_recipe == "delayed":
        yield (
            "model.fp8_recipe=delayed scales by earlier updates: scores taken after an update that moved activations "
            "are quantised by scales that are one update old; tensorwise has none"
        )
