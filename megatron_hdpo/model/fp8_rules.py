"""Rules of FP8 training: allowed combinations of recipe keys, and needs of shapes and devices.

Only the matrix products of the transformer layers run in FP8. Embedding and head are Megatron's own modules, which have
no FP8; log-probs and divergences are computed by this package in float32. FP8 was not run when this was written: the
rules are those of megatron-core 0.16.1 and Transformer Engine 2.11, read in their sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.config import ModelConfig, SpecName
from megatron_hdpo.parallel.layout import ParallelConfig

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

# Compute capabilities: the lowest that runs a recipe, and the first above it that does not (Transformer Engine 2.11).
_CAPABILITIES = {
    "delayed": ((8, 9), None, "Ada or Hopper"),
    "tensorwise": ((8, 9), None, "Ada or Hopper"),
    "blockwise": ((9, 0), None, "Hopper, with CUDA 12.9"),
    "mxfp8": ((10, 0), (12, 0), "Blackwell (B200); H100 and H200 have none"),
}


def alignment(config: ModelConfig | TransformerConfig) -> int:
    """Return the number that divides all dimensions of an FP8 matrix product, rows included; 1 without FP8."""
    if config.fp8 is None:
        return 1
    return 32 if config.fp8_recipe == "mxfp8" else 16


def precision_errors(config: ModelConfig, layout: ParallelConfig, architecture: Architecture) -> Iterator[str]:
    """Yield the reasons why the recipe's precision settings cannot work, each beginning with its key."""
    if config.fp8_param:
        yield (
            "model.fp8_param: weights kept in FP8 alone are not supported: Megatron would make the fp32 main weights "
            "from the layers' initial values instead of the checkpoint's, teachers kept in host memory would not be "
            "restored bit for bit, and with blockwise scales it is known to give NaN beyond TP 2. Remove it: model.fp8 "
            "computes in FP8 from bfloat16 weights"
        )
    yield from _recompute_errors(config, architecture)
    yield from _emulation_errors(config)
    yield from _unquantised_layer_errors(config, layout, architecture)
    if config.fp8 is None:
        if config.fp8_recipe != ModelConfig.model_fields["fp8_recipe"].default:
            yield "model.fp8_recipe: there is no FP8 without model.fp8"
        return
    yield from _fp8_errors(config, layout, architecture)


def _recompute_errors(config: ModelConfig, architecture: Architecture) -> Iterator[str]:
    if config.recompute != "selective":
        if config.recompute_modules != ModelConfig.model_fields["recompute_modules"].default:
            yield "model.recompute_modules: only used with model.recompute=selective"
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
                "layers norms are part of the products that follow, and plain torch layers do not support it"
            )
    if config.fp8_recipe == "delayed" and config.fp8 is not None and "layernorm" in config.recompute_modules:
        yield "model.recompute_modules: layernorm cannot be recomputed with fp8_recipe=delayed"


def _emulation_errors(config: ModelConfig) -> Iterator[str]:
    if config.fp8_emulation is None:
        return
    if config.fp8 is not None:
        yield "model.fp8_emulation: not together with model.fp8, which computes in FP8 itself: remove one of the two"
    if config.spec != "torch":
        yield f"model.fp8_emulation: emulates FP8 in plain torch layers: set model.spec=torch, not {config.spec}"


def _unquantised_layer_errors(config: ModelConfig, layout: ParallelConfig, architecture: Architecture) -> Iterator[str]:
    """Yield the reasons why these layers cannot be the ones that stay without FP8."""
    if not any(config.first_last_layers_bf16):
        return
    if config.fp8 is None and config.fp8_emulation is None:
        yield "model.first_last_layers_bf16: all layers are bfloat16 without model.fp8"
        return
    if config.fp8 is not None and config.fp8_recipe == "delayed":
        yield "model.first_last_layers_bf16: not with fp8_recipe=delayed, whose scales would not all be reduced"
    per_stage = architecture.num_layers // layout.pipeline
    if max(config.first_last_layers_bf16) > per_stage:
        yield f"model.first_last_layers_bf16: at most the {per_stage} layers of a pipeline stage at either end"


def _fp8_errors(config: ModelConfig, layout: ParallelConfig, architecture: Architecture) -> Iterator[str]:
    if config.spec == "torch":
        yield "model.fp8: needs model.spec=transformer_engine; under plain torch layers it would do nothing"
    if config.dtype == "float32":
        yield "model.fp8: needs model.dtype=bfloat16, not float32"
    yield from size_errors(config, layout, architecture)


def size_errors(config: ModelConfig, layout: ParallelConfig, architecture: Architecture) -> Iterator[str]:
    """Yield an error for each size of a model (policy or teacher) that FP8 matrix products cannot have."""
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
    """Return why the recipe's precision does not run with this run's layers and device; None if it runs."""
    if spec == "torch" and config.recompute == "selective" and "layernorm" in config.recompute_modules:
        return "model.recompute_modules: layernorm needs Transformer Engine, and this run has plain torch layers"
    if spec != "torch" and config.fp8_emulation is not None:
        return "model.fp8_emulation emulates FP8 in plain torch layers, and this run has those of Transformer Engine"
    if config.fp8 is None:
        return None
    if spec == "torch":  # Megatron would silently compute in bfloat16
        return "model.fp8 needs Transformer Engine on a GPU, and this run has plain torch layers"
    import torch

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
    """Yield warnings about the recipe's precision that do not depend on the device."""
    if config.fp8_emulation is not None:
        yield (
            f"model.fp8_emulation={config.fp8_emulation}: products are rounded as in FP8, but computed in float32, "
            "which takes longer than no FP8: for studying its effect (docs/fp8-emulation.md)"
        )
    if config.fp8 is not None and config.fp8_recipe == "mxfp8":
        yield "model.fp8_recipe=mxfp8 runs on Blackwell only: on H100 and H200 the run stops at its start"
    if config.fp8 is not None and config.fp8_recipe == "delayed":
        yield (
            "model.fp8_recipe=delayed takes scales from earlier updates: scores taken after an update that changed "
            "activations are quantised by scales that are one update old; tensorwise has no old scales"
        )
