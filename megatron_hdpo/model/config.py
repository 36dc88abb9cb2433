"""The model and optimizer sections of the recipe."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from megatron_hdpo.environment import engine_does_not_load
from megatron_hdpo.types.errors import UserError

if TYPE_CHECKING:
    import torch

SpecName = Literal["transformer_engine", "torch"]

Layers = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
DTYPES = ("float32", "bfloat16")
"""Names of the types that a model can have; each is an attribute of torch."""


class ModelConfig(BaseModel):
    """The model to train, its precision and its memory options."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    path: str = Field(
        description="Hugging Face checkpoint folder (config.json, safetensors, tokenizer), or a model of the hub that "
        "`megatron_hdpo prepare` has downloaded: org/name or org/name@revision."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Type of weights and activations; main weights and gradients are always fp32. auto: bfloat16 on "
        "GPUs, and on CPUs where matrix products are measured to be no slower than in float32; a resumed "
        "run keeps its type.",
    )
    spec: Literal["auto", "transformer_engine", "torch"] = Field(
        "auto",
        description="Layer spec; auto takes Transformer Engine on a GPU where it is installed, else plain torch.",
    )
    fp8: Literal["hybrid", "e4m3"] | None = Field(
        None,
        description="The layers' matrix products in FP8, by Transformer Engine: e4m3 throughout, or hybrid, whose "
        "gradients are e5m2. Embedding, head, log-probs and divergences stay as they are.",
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = Field(
        "tensorwise",
        description="Source of FP8 scales: delayed, earlier values of the tensor; tensorwise, the tensor itself; "
        "blockwise, its blocks of 128; mxfp8, its blocks of 32 (Blackwell).",
    )
    fp8_emulation: Literal["tensorwise", "blockwise", "mxfp8"] | None = Field(
        None,
        description="With spec=torch, on any device: round the operands of the layers' matrix products as the FP8 "
        "recipe of this name does, and multiply in float32. Slower than no FP8; shows its effect without a GPU.",
    )
    fp8_param: bool = Field(False, description="Keep the weights themselves in FP8: refused, see docs/precision.md.")
    first_last_layers_bf16: tuple[Layers, Layers] = Field(
        (0, 0),
        description="With fp8 or fp8_emulation: how many layers at the start and at the end of the model stay without "
        "FP8.",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="What the backward pass recomputes to save memory: nothing, recompute_modules, or whole layers "
        "(true and false are full and none).",
    )
    recompute_modules: list[Literal["core_attn", "layernorm", "mlp", "moe"]] = Field(
        ["core_attn"], min_length=1, description="With recompute=selective: parts of a layer that are recomputed."
    )
    max_sequence: int | None = Field(
        None, ge=2, description="Longest sequence (prompt plus response); default: the model's own maximum."
    )

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the type of the weights.

        Raises ModelError while `dtype` is still auto: `config.precision.resolve` must come first.
        """
        if self.dtype not in DTYPES:
            raise ModelError("model.dtype: auto is not settled yet: call megatron_hdpo.config.precision.resolve first")
        import torch

        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @field_validator("recompute", mode="before")
    @classmethod
    def _as_a_word(cls, value: Any) -> Any:
        return ("full" if value else "none") if isinstance(value, bool) else value


class OptimizerConfig(BaseModel):
    """AdamW on fp32 main weights, sharded over the data-parallel ranks."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    lr: float = Field(1e-6, gt=0, allow_inf_nan=False, description="Peak learning rate.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's moment decays.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay of matrices; vectors have none.")
    clip_grad: float = Field(1.0, ge=0, description="Global gradient norm is clipped to this; 0: not at all.")
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps of linear warm-up.")
    warmup_start: float = Field(0.1, ge=0, le=1, description="The warm-up starts at this fraction of lr.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="Shape of the learning rate after the warm-up.",
    )
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of linear and cosine schedules.")
    offload: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of a GPU's part of main weights and moments that rests in host memory and is updated there "
        "by the CPU.",
    )


class ModelError(UserError, ValueError):
    """A model section of the recipe that cannot be built on this machine."""


def transformer_engine_available() -> bool:
    """Return whether Transformer Engine's torch part can be imported, without importing it."""
    return importlib.util.find_spec("transformer_engine") is not None


def choose_spec(config: ModelConfig, device: torch.device) -> SpecName:
    """Return the layer spec of this run. Raises ModelError when it takes Transformer Engine and that cannot run."""
    available = device.type == "cuda" and transformer_engine_available()
    if available and config.spec != "torch":
        _check_that_the_engine_loads()
    if config.spec == "auto":
        return "transformer_engine" if available else "torch"
    if config.spec == "transformer_engine" and not available:
        raise ModelError("model.spec=transformer_engine needs a GPU and the transformer-engine package: use spec=torch")
    return config.spec


def _check_that_the_engine_loads() -> None:
    """Raise ModelError if Transformer Engine is incomplete; Megatron takes an ImportError in it for its absence."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:
        raise ModelError(f"{engine_does_not_load(error)}; or set model.spec=torch") from error
