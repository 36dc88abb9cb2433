"""Kernels that the host launches for a micro-batch.

The numbers of the plain-torch spec were counted by rehearsals of the program (docs/rehearsal.md), how they divide into
forward, backward and experts was read; those of Transformer Engine are from reading its modules, and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.costs.micro_batch_shape import PackedShape
from megatron_hdpo.model.architecture import Architecture


@dataclass(frozen=True)
class _PerLayer:
    """Launches of one layer, forward and backward; per_expert: of each expert of the rank."""

    forward: int
    backward: int
    per_expert: tuple[int, int] = (0, 0)


# Plain torch, dense: 105 counted, over one rank and over two tensor-parallel ranks alike. A mixture: 250 forward and
# 305 backward counted with 16 experts on the rank.
_DENSE = {"torch": _PerLayer(36, 69), "transformer_engine": _PerLayer(21, 45)}
_MIXTURE = {"torch": _PerLayer(138, 65, per_expert=(7, 15)), "transformer_engine": _PerLayer(35, 70)}
# Of the head, per chunk of response rows: trained without and with a target (counted), scored (counted on an earlier
# head); and per micro-batch beside layers and head.
_TRAINED_CHUNK, _TARGETED_CHUNK, _SCORED_CHUNK, _REST = 39, 51, 67, 20
# Beside them, counted: of a recomputed layer, more than its second forward pass; of a trained micro-batch on the last
# stage, loss terms and metrics.
_AGAIN, _LOSS = 7, 118


def micro_batch_launches(
    a: Architecture, layout: Layout, stage: int, shape: PackedShape, head_chunk: int, *, backward: bool
) -> int:
    """Return the number of kernels that one rank launches for one micro-batch."""
    kind = (_MIXTURE if a.num_experts else _DENSE)[layout.spec]
    experts = a.num_experts // layout.expert
    forward, back = kind.forward + experts * kind.per_expert[0], kind.backward + experts * kind.per_expert[1]
    again = int(layout.recompute) * (forward + _AGAIN)
    passes = forward + again + back if backward else forward
    total = _REST + a.num_layers // layout.pipeline * passes
    if stage == layout.pipeline - 1:
        chunks = max(1, -(-shape.responses // head_chunk))
        trained = _TARGETED_CHUNK if shape.targets else _TRAINED_CHUNK
        total += chunks * trained + _LOSS if backward else chunks * _SCORED_CHUNK
    return total
