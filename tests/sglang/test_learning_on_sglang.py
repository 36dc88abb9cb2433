"""The learning test with SGLang in place of the embedded engine: same recipe, same first seed, same thresholds.

One seed, and GRPO alone as the control: a CPU server needs minutes for what the embedded engine does in seconds.
MEGATRON_HDPO_LEARNING_SEEDS="0 1 2" runs more.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from learning import SEEDS, check_lift, learn_all, scores_of
from make_tiny_model import make_tiny_model

from megatron_hdpo.rollout.sglang.command import Launch
from megatron_hdpo.rollout.sglang.server import ServerProcess
from megatron_hdpo.rollout.sglang.server_config import ServerConfig


@pytest.mark.slow
def test_hdpo_learns_on_sglang(sglang_config: ServerConfig, warmed_up: Path, tmp_path: Path) -> None:
    """The server is started once, with random weights: the run's arrive by its syncs."""
    model = make_tiny_model(tmp_path / "model")
    config = sglang_config.model_copy(update={"max_running_requests": 64})
    process = ServerProcess(config, Launch(model, "cpu"), tmp_path)
    try:
        process.start()
        process.wait_ready()
        settings = ["rollout.engine=sglang", "rollout.sglang.placement=given", f"rollout.sglang.urls=[{process.url}]"]
        settings += ["rollout.sglang.servers.dtype=float32", "rollout.sglang.max_concurrency=64"]
        seeds = SEEDS if "MEGATRON_HDPO_LEARNING_SEEDS" in os.environ else SEEDS[:1]
        results = [learn_all(warmed_up, tmp_path, ("grpo", "hdpo"), settings, [seed])[0] for seed in seeds]
    finally:
        process.close()
    check_lift(scores_of(results), ["grpo"])
