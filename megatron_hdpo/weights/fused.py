"""The experts of a layer in one stored tensor each for two projections, as transformers 5 may save them.

transformers computes a Qwen3 mixture of experts with `experts.gate_up_proj` [experts, 2 x channels, hidden], in which
each expert has the rows of its gate before those of its up projection, and `experts.down_proj` [experts, hidden,
channels]. `save_pretrained` splits them into one tensor per expert, unless it is told not to. The order of the
dimensions follows from the architecture alone: a tensor whose two last dimensions are equal does not show it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(r"(?P<experts>.+\.experts)\.(?P<projection>gate_up_proj|down_proj)")
_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_MOST_EXPERTS = 65_536
"""No model has more; the header of a damaged file can name any number."""


@dataclass(frozen=True)
class Part:
    """Rows `start:stop` of one expert in a stored tensor [experts, rows, columns]."""

    stored: str
    expert: int
    start: int
    stop: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape that the part has as a tensor of its own."""
        return self.stop - self.start, self.columns

    def index(self, dim: int, start: int, stop: int) -> tuple[int, slice, slice]:
        """Return the place, in the stored tensor, of rows (dim 0) or columns (dim 1) start:stop of the part."""
        if dim == 0:
            return self.expert, slice(self.start + start, self.start + stop), slice(0, self.columns)
        return self.expert, slice(self.start, self.stop), slice(start, stop)


def parts_of(stored: str, shape: tuple[int, ...]) -> dict[str, Part]:
    """Return the tensors of single experts, by their usual names, that a stored tensor holds; {} for any other one."""
    found = _NAME.fullmatch(stored)
    if found is None or len(shape) != 3 or 0 in shape or shape[0] > _MOST_EXPERTS:
        return {}
    projections = _PROJECTIONS[found["projection"]]
    if shape[1] % len(projections):
        return {}
    rows = shape[1] // len(projections)
    return {
        f"{found['experts']}.{expert}.{projection}.weight": Part(
            stored, expert, number * rows, (number + 1) * rows, shape[2]
        )
        for expert in range(shape[0])
        for number, projection in enumerate(projections)
    }
