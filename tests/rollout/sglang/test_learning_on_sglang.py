"""The learning test with SGLang in place of the embedded engine: same recipe, same first seed, same thresholds.

One seed, and GRPO alone as the control: a CPU server needs minutes for what the embedded engine does in seconds.
`make test-long` runs it; `make test` has one step on a server's rollouts, compared with one on any engine's
(test_run_on_sglang.py).
MEGATRON_HDPO_LEARNING_SEEDS="0 1 2" runs more.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from learning import LONG, SEEDS, Metrics, check_lift, last_metrics, learn, scores_of

from megatron_hdpo.model.tiny_model import make_tiny_model
from megatron_hdpo.rollout.sglang.servers.command import ServerLaunch
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.rollout.sglang.servers.fleet import ServerFleet

VARIANTS = ("grpo", "hdpo")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_hdpo_learns_on_sglang(sglang_config: ServerConfig, warmed_up: Path, tmp_path: Path) -> None:
    """The servers start with random weights: a run's arrive by its syncs."""
    seeds = SEEDS if "MEGATRON_HDPO_LEARNING_SEEDS" in os.environ else SEEDS[:1]
    config = sglang_config.model_copy(update={"max_running_requests": 256, "max_total_tokens": 32_768})
    model = make_tiny_model(tmp_path / "model")
    servers = ServerFleet(config, [ServerLaunch(model, "cpu", index=index) for index in range(len(VARIANTS))], tmp_path)
    try:
        servers.start()
        results = [learn_side_by_side(servers.urls, warmed_up, tmp_path, seed) for seed in seeds]
    finally:
        servers.close()
    check_lift(scores_of(LONG, results), ["grpo"])


def learn_side_by_side(urls: list[str], warmed_up: Path, folder: Path, seed: int) -> dict[str, Metrics]:
    """What `learning.learn` returns for each variant, each with a server of its own, beside what they began with."""
    common = ["rollout.engine=sglang", "rollout.sglang.placement=given"]
    common += ["rollout.sglang.servers.dtype=float32", "rollout.sglang.max_concurrency=256"]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = [
            pool.submit(learn, LONG, warmed_up, folder, (variant,), [*common, f"rollout.sglang.urls=[{url}]"], seed)
            for variant, url in zip(VARIANTS, urls, strict=True)
        ]
        found = {variant: metrics for run in runs for variant, metrics in run.result().items()}
    return {"warmed_up": last_metrics(warmed_up / f"seed{seed}"), **found}
