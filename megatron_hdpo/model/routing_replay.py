"""Routing replay: the trainer sends tokens to the experts that the engine chose when it sampled them.

Engine and trainer round differently, and if two experts have nearly equal scores their routers may choose differently:
the token then passes other weights than those that sampled it. Only the choice is taken from the engine; the
probabilities of the chosen experts are the trainer's own, with their gradient. Known as rollout routing replay, R3
(arXiv 2510.11370).

The experts are part of the description of a micro-batch's sequences (PackedRowParams), which every layer gets as an
argument, in a forward pass and when it is recomputed. So a layer always gets the experts of the micro-batch that it
computes, whatever the pipeline schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_hdpo.model.packing import PackedRowParams, PackedSequences
from megatron_hdpo.types.transfer import to_device

NOT_CHOSEN = -1
"""Value that lets the trainer's router choose: padding, the last token of a sequence, tokens without engine routing."""


@dataclass
class RoutedSeqParams(PackedRowParams):
    """PackedRowParams with the experts of the rows.

    routed_experts_MLK: int16 [M, layers of the model, experts per token], for the rows of this context-parallel rank.
    """

    routed_experts_MLK: Tensor | None = None


def with_routing(params: PackedRowParams, routed_experts_MLK: Tensor | None) -> PackedRowParams:
    """Add the experts of a micro-batch, if there are any, to `params` and move them to the device.

    The experts of a whole step are large, so they stay on the host until their micro-batch runs.
    """
    if routed_experts_MLK is None:
        return params
    return RoutedSeqParams(**vars(params), routed_experts_MLK=to_device(routed_experts_MLK, params.cu_seqlens_q.device))


def pack_routing(
    packed: PackedSequences, routed_experts: Sequence[np.ndarray | None], lengths: Sequence[int]
) -> Tensor | None:
    """Pack the experts of a micro-batch's rows on this rank, int16 [M, L, K] on the host; None if there are none.

    routed_experts: for each sequence int [length - 1, L, K] (no engine routes the last token), or None if the trainer's
    router chooses. Raises ValueError if the number of tokens, layers or choices does not fit.
    """
    for experts, length in zip(routed_experts, lengths, strict=True):
        if experts is not None and len(experts) != length - 1:
            raise ValueError(
                f"experts of {len(experts)} tokens for a sequence of {length} tokens: {length - 1} are needed (all but "
                "the last token)"
            )
    sizes = {experts.shape[1:] for experts in routed_experts if experts is not None}
    if not sizes:
        return None
    if len(sizes) > 1:
        raise ValueError(f"sequences of one micro-batch have experts of different layers x choices: {sorted(sizes)}")
    experts_MLK = np.full((packed.num_tokens, *sizes.pop()), NOT_CHOSEN, dtype=np.int16)
    for start, experts in zip(packed.starts, routed_experts, strict=True):
        if experts is not None:
            experts_MLK[start : start + len(experts)] = experts
    return torch.from_numpy(experts_MLK[packed.own_rows_M])


class RoutingReplay:
    """Replacement of the router's top-k choice, called by Megatron's router as `router.router_replay`.

    Megatron's own RouterReplay keeps all routers of a process, a teacher's too, in one list, and needs a call at every
    change between forward and backward.

    chosen_MK: experts of the rows that the router sees next, int64; None: the router chooses for all rows.
    """

    def __init__(self) -> None:
        self.chosen_MK: Tensor | None = None

    def get_replay_topk(
        self,
        scores_ME: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return scores and indices of the chosen experts, [M, K] each.

        scores_ME: the router's scores of all experts. default_compute_topk: Megatron's own choice.
        """
        values_MK, own_MK = default_compute_topk(scores_ME, topk, num_groups=num_groups, group_topk=group_topk)
        if self.chosen_MK is None:
            return values_MK, own_MK
        chosen_MK = torch.where(self.chosen_MK == NOT_CHOSEN, own_MK, self.chosen_MK)
        return scores_ME.gather(1, chosen_MK), chosen_MK

    def take(self, chosen_MK: Tensor | None, _: Any = None) -> None:
        """Use these experts from now on."""
        self.chosen_MK = chosen_MK


def replay_routing(model: nn.Module) -> None:
    """Make every expert layer of `model` follow the experts of the `RoutedSeqParams` that it is called with.

    With other PackedSeqParams the layer's router chooses as usual.
    """
    for layer in model.modules():
        if isinstance(layer, TransformerLayer) and isinstance(layer.mlp, MoELayer):
            replay = RoutingReplay()
            layer.mlp.router.router_replay = replay
            layer.register_forward_pre_hook(partial(_take_rows, replay), with_kwargs=True)
            if layer.mlp.moe_layer_recompute:
                layer.mlp.register_forward_hook(partial(_take_again_in_backward, replay))


def _take_rows(replay: RoutingReplay, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    experts_MLK = getattr(kwargs.get("packed_seq_params"), "routed_experts_MLK", None)
    if experts_MLK is None:
        replay.take(None)
        return
    experts_MK = experts_MLK[:, layer.layer_number - 1]
    if layer.config.sequence_parallel:
        group = layer.mlp.router.tp_group
        experts_MK = experts_MK.chunk(group.size())[group.rank()]
    replay.take(experts_MK.long())


def _take_again_in_backward(replay: RoutingReplay, _: nn.Module, args: Any, output: tuple[Tensor, Any]) -> None:
    """Restore a micro-batch's experts before its expert block is recomputed in the backward pass.

    Recomputation of the experts alone does not call the layer again, and other micro-batches may have run in between.
    It begins when the gradient of the block's output is there, so a hook on that gradient comes in time.
    """
    if output[0].requires_grad:
        output[0].register_hook(partial(replay.take, replay.chosen_MK))
