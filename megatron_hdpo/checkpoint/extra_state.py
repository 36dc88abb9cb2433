"""Extra states of Transformer Engine's layers in a checkpoint: FP8 scales, which plain torch layers do not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from torch import nn

from megatron_hdpo.weights.stored import check_metadata

_EXTRA = "_extra_state"


def without_absent_extra_states(model: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a model's sharded state dict without the extra states that the checkpoint at `path` lacks.

    A checkpoint of plain torch layers lacks them all, and reading it with them would fail.
    """
    wanted = {name: value for name, value in model.items() if _EXTRA in name}
    if not wanted:
        return model
    check_metadata(path)
    stored = load_sharded_metadata(str(path))
    absent = {name for name, value in wanted.items() if value.unique_key not in stored}
    return {name: value for name, value in model.items() if name not in absent}


def load_model(model: nn.Module, state: dict[str, Any]) -> None:
    """Load a state dict that may lack extra states; a layer without one makes its scales anew.

    Raises RuntimeError when anything else is missing or unknown.
    """
    absent = {name: None for name in model.state_dict() if _EXTRA in name and name not in state}
    model.load_state_dict(state | absent)
