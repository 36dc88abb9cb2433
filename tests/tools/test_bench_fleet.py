"""A small fleet of fake servers under the real client: nothing is lost, and slow and broken servers get less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import bench_fleet
import pytest
from _fake_fleet import ServerModel

MODEL = ServerModel(
    slots=4, first_s=0.02, each_s=0.0025, prefill_steps=1.0, prompt_tokens=8, median=12.0, sigma=0.5, seed=0
)


def measured(prompts: int, model: ServerModel, **what: Any) -> dict[str, Any]:
    batch = bench_fleet.Batch(prompts, 4, 24)
    return bench_fleet.measure(8, batch, model, stream_interval=4, health_timeout_s=60.0, **what)


def test_faults_and_updates_cost_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_fleet, "WHEN", {"slow": (0.0, 1e3), "failing": (0.0, 1e3), "dead": (0.3, 1e3)})
    found = measured(24, MODEL, kinds=("slow", "failing", "dead"), updates=(0.5,))
    assert found["samples"] == 96 and not found["lost"]
    metrics = found["metrics"]
    assert metrics["servers/tripped"] and metrics["servers/taken_out"] == 1 and metrics["servers/in_use"] == 6
    assert found["tokens_of_slow_over_mean"] < 0.75
    assert set(found["staleness"]) == {"0_updates", "1_updates", "mixed_samples"}
    assert found["staleness"]["0_updates"] + found["staleness"]["1_updates"] == pytest.approx(1)
    assert found["longest_server_queue"] <= 1, "samples wait in the engine, not on a server"


def test_prompts_bound_in_turn_wait_for_the_slow_server() -> None:
    found = measured(16, replace(MODEL, first_s=0.01, each_s=0.001), kinds=("slow",), in_turn=True)
    assert not found["lost"] and not found["metrics"]["servers/failed_tries"]
    assert found["tokens_of_slow_over_mean"] > 0.5
    assert found["tail_s"] > 0.2 * found["seconds"], "others are idle meanwhile"
