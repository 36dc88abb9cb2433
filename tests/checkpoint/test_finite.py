"""A model with a weight that is no number is never saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_helper import run_ranks
from tiny_policy import OPTIMIZER, build_policy, joined, make_checkpoint

from megatron_hdpo.checkpoint.store import CheckpointError, CheckpointStore


def save_with(value: float, model: Path, run: Path, layout: dict[str, int]) -> tuple[list[str], list[str]]:
    """Save step 1, put `value` into one weight of the last rank, save step 2; the messages, and what is there then."""
    with joined(**layout) as context:
        policy = build_policy(model, context, optimizer=OPTIMIZER)
        store = CheckpointStore(run, context, keep=2)
        store.save(1, policy)
        if context.rank == context.world_size - 1:
            with torch.no_grad():
                list(policy.model.parameters())[-1].flatten()[0] = value
        message = ""
        try:
            store.save(2, policy)
        except CheckpointError as error:
            message = str(error)
        return context.gather_objects(message), sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e30])
@pytest.mark.parametrize(("family", "layout"), [("qwen2", {"pipeline": 2}), ("qwen3_moe", {"expert": 2})])
@pytest.mark.fault(
    "a weight is NaN or infinite",
    phase="saving",
    seen="`step ... is not saved`, with tensor and rank; exit code 2",
    lost="the steps since the last checkpoint",
)
def test_only_numbers_are_saved(family: str, layout: dict[str, int], value: float, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path / "model")
    for messages, saved in run_ranks(2, save_with, value, model, tmp_path / "run", layout):
        if abs(value) < float("inf"):
            assert messages == ["", ""] and saved == ["step_00000001", "step_00000002"]
        else:
            assert len(set(messages)) == 1 and "step 2 is not saved" in messages[0] and "(rank 1)" in messages[0]
            assert saved == ["step_00000001"]
