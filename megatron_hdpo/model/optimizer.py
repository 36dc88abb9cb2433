"""Construction of Megatron's distributed optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Any, cast

from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_hdpo.model.chunks import chunks_of
from megatron_hdpo.model.config import OptimizerConfig
from megatron_hdpo.parallel.context import ParallelContext


def build_optimizer(
    config: OptimizerConfig, ddp: nn.Module, context: ParallelContext, total_steps: int
) -> tuple[ChainedOptimizer, OptimizerParamScheduler]:
    """Build the optimizer of this rank's shard and the learning-rate schedule over `total_steps` optimizer steps."""
    model = cast(TransformerConfig, ddp.config)
    with context.megatron_calls():
        settings = MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=model.bf16,
            params_dtype=model.params_dtype,
            use_distributed_optimizer=True,
            **_offload_settings(config),
        )
        optimizer = get_megatron_optimizer(
            settings,
            chunks_of(ddp),
            config_overrides=get_standard_config_overrides(settings),
            use_gloo_process_groups=False,
            pg_collection=context.groups,
        )
    return optimizer, _schedule(config, optimizer, total_steps)


def _offload_settings(config: OptimizerConfig) -> dict[str, Any]:
    """Return the settings of Megatron's HybridDeviceOptimizer; none without offload.

    The offloaded share is updated on the CPU by torch's AdamW, while gradients and new weights of other parameters are
    copied. Megatron's precision-aware optimizer (all in fp32 here) is needed to offload the main weights together with
    the moments: without it a second copy of them stays on the GPU, and checkpoints cannot be loaded.
    """
    if not config.offload:
        return {}
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": config.offload,
        "overlap_cpu_optimizer_d2h_h2d": True,
        "use_precision_aware_optimizer": True,
    }


def _schedule(config: OptimizerConfig, optimizer: ChainedOptimizer, total_steps: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.warmup_start * config.lr if config.warmup_steps else config.lr,
        max_lr=config.lr,
        min_lr=config.min_lr if config.schedule != "constant" else config.lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(total_steps, config.warmup_steps + 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
    )
