"""Train a tiny policy for two steps, save it, and go on: `python saved_elsewhere.py FOLDER`, on any Megatron-Core.

Writes FOLDER/<format>/ with the checkpoint and FOLDER/went_on.json with the metrics of the steps after it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import megatron.core
from layout_cases import digest, share
from tiny_policy import SPEC, build_policy, joined, make_checkpoint, make_examples, weights_of

from megatron_hdpo.checkpoint.store import CheckpointStore
from megatron_hdpo.model.config import OptimizerConfig
from megatron_hdpo.model.policy import Policy

MODEL = "qwen3_moe"
FORMATS = {"sharded": False, "reshardable": True}
OPTIMIZER = OptimizerConfig(lr=0.02, eps=1e-6, weight_decay=0.1, warmup_steps=3, schedule="cosine")


def steps(policy: Policy, which: range) -> list[dict[str, float]]:
    """Take steps on the examples of these numbers; return their metrics."""
    return [policy.update(share(policy, make_examples(seed=step)), SPEC) for step in which]


def save(folder: Path) -> dict[str, Any]:
    """Save a checkpoint in each format after two steps; return what came of the next three."""
    path, seen = make_checkpoint(MODEL, folder), {}
    with joined() as context:
        for name, reshardable in FORMATS.items():
            policy = build_policy(path, context, optimizer=OPTIMIZER, total_steps=6, dtype="bfloat16")
            steps(policy, range(2))
            CheckpointStore(folder / name, context, keep=1, reshardable=reshardable).save(2, policy)
            saved = digest(weights_of(policy))
            seen[name] = {"saved": saved, "metrics": steps(policy, range(2, 5))}
    return {"megatron_core": megatron.core.__version__, "formats": seen}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "went_on.json").write_text(json.dumps(save(target)))
