"""Memory that a training step takes in passing, beside what the layers keep: moment by moment of its backward pass.

The largest moment decides the peak. Each function returns one moment's bytes by what is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_hdpo.costs.activations import gated_bytes
from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.costs.micro_batch_shape import PackedShape
from megatron_hdpo.model.architecture import Architecture


@dataclass(frozen=True)
class Moment:
    """Bytes by kind at one moment. freed: bytes of the layer's kept tensors that are gone by then."""

    kinds: dict[str, int]
    freed: int = field(default=0)

    @property
    def added(self) -> int:
        """Return the bytes beside the layer's kept tensors."""
        return sum(self.kinds.values()) - self.freed


def layer_moment(a: Architecture, layout: Layout, shape: PackedShape) -> Moment:
    """Return the largest moment of one layer's backward pass."""
    if a.num_experts:
        return _experts(a, layout, shape)
    return max((_fc2(a, layout, shape), _fc1(a, layout, shape)), key=lambda moment: moment.added)


def _experts(a: Architecture, layout: Layout, shape: PackedShape) -> Moment:
    """Return the moment at which the results of a layer's experts are joined, in a recomputed or in the last forward.

    Beside what the layer keeps there are the rows as they are sent, received and computed; plain torch, whose experts
    run one by one, has their results twice.
    """
    own = shape.rows // layout.sequence_ranks
    places = own * a.experts_per_token * layout.expert_tensor
    copies = 2 + int(layout.expert > 1) + int(layout.spec == "torch" and a.num_experts > layout.expert)
    kinds = _of_output(a, layout, shape) if layout.recompute else {}
    return Moment(kinds | {"rows of experts": copies * places * a.hidden_size * layout.value_bytes})


def _fc2(a: Architecture, layout: Layout, shape: PackedShape) -> Moment:
    """Return the moment of the weight gradient of the FFN's last product; everything that was kept is still there."""
    value, ffn = layout.value_bytes, a.ffn_size // layout.tensor
    kinds = _of_output(a, layout, shape)
    kinds["gradients of activations"] += shape.rows * ffn * value
    kinds["gradient of a matrix"] = a.hidden_size * ffn * value
    if layout.sequence_ranks > 1:
        kinds["gathered gradient"] = shape.rows * a.hidden_size * value
    return Moment(kinds)


def _fc1(a: Architecture, layout: Layout, shape: PackedShape) -> Moment:
    """Return the moment of the weight gradient of the FFN's first product; its output and what follows are gone."""
    value, ffn, rows = layout.value_bytes, a.ffn_size // layout.tensor, shape.rows
    kinds = _of_output(a, layout, shape)
    own = rows // layout.sequence_ranks if layout.sequence_ranks > 1 else 0
    kinds["gradients of activations"] += (rows * (2 * ffn + a.hidden_size) + own * a.hidden_size) * value
    kinds["gradient of a matrix"] = 2 * ffn * a.hidden_size * value
    if layout.sequence_ranks > 1 and layout.spec != "torch":  # Megatron's own layers gather into one lasting buffer
        kinds["gathered input"] = rows * a.hidden_size * value
    return Moment(kinds, gated_bytes(a, layout, rows))


def _of_output(a: Architecture, layout: Layout, shape: PackedShape) -> dict[str, int]:
    """Return the gradient of the layer's output, and the output itself where the layer was recomputed."""
    own = shape.rows // layout.sequence_ranks * a.hidden_size * layout.value_bytes
    return {"gradients of activations": own} | ({"recomputed output": own} if layout.recompute else {})
