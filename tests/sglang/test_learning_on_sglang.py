"""The learning test with SGLang in place of the embedded engine: same recipe, same first seed, same thresholds.

One seed, and GRPO alone as the control: a CPU server needs minutes for what the embedded engine does in seconds.
MEGATRON_HDPO_LEARNING_SEEDS="0 1 2" runs more.
"""

from __future__ import annotations

import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from make_tiny_model import make_tiny_model
from test_learning import hard_pass_at_8, learn

from megatron_hdpo.rollout.sglang.command import Launch
from megatron_hdpo.rollout.sglang.server import ServerProcess
from megatron_hdpo.rollout.sglang.server_config import ServerConfig

SEEDS = [int(seed) for seed in os.environ.get("MEGATRON_HDPO_LEARNING_SEEDS", "0").split()]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_hdpo_learns_on_sglang(sglang_config: ServerConfig, tmp_path: Path) -> None:
    """The server is started once, with random weights: the run's arrive by its syncs."""
    model = make_tiny_model(tmp_path / "model")
    config = sglang_config.model_copy(update={"max_running_requests": 64})
    process = ServerProcess(config, Launch(model, "cpu"), tmp_path)
    try:
        process.start()
        process.wait_ready()
        settings = ["rollout.engine=sglang", "rollout.sglang.placement=given", f"rollout.sglang.urls=[{process.url}]"]
        settings += ["rollout.sglang.servers.dtype=float32", "rollout.sglang.max_concurrency=64"]
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            results = [
                pool.submit(learn, seed, str(tmp_path / f"seed{seed}"), ("grpo", "hdpo"), settings).result()
                for seed in SEEDS
            ]
    finally:
        process.close()
    scores = {v: [hard_pass_at_8(result[v]) for result in results] for v in ("warmed_up", "grpo", "hdpo")}
    print({name: [round(score, 3) for score in values] for name, values in scores.items()})
    assert max(scores["warmed_up"]) < 0.1, "the hard sums must be cliffs to begin with"
    margins = [h - c for h, c in zip(scores["hdpo"], scores["grpo"], strict=True)]
    assert min(margins) > 0 and statistics.mean(margins) > 0.1, f"margin over GRPO: {margins}"
