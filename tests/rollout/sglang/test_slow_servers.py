"""Servers that take longer than a collective may wait: ranks of a sharded trainer wait for them, or go on without."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import pytest
from distributed_helper import run_ranks
from fault_proxy import delay, held, serving
from sglang_ranks import settings
from stand_in_server import StandIn
from tiny_policy import build_policy, make_checkpoint

COLLECTIVE_S, SLOW_S = 5.0, 8.0


def two_syncs(model: Path, folder: Path, urls: list[str]) -> list[dict[str, Any]]:
    """The servers' states after a sync in which one hangs, and after one in which the other is slow."""
    from megatron_hdpo.parallel.context import start
    from megatron_hdpo.parallel.layout import ParallelConfig
    from megatron_hdpo.rollout.build import _transport
    from megatron_hdpo.rollout.sglang.engine import SGLangEngine
    from megatron_hdpo.rollout.sglang.weights.push import WeightPush
    from megatron_hdpo.rollout.weight_sync import ServerSync
    from megatron_hdpo.weights.stream import stream_hf

    context = start(ParallelConfig(tensor=2, timeout_minutes=COLLECTIVE_S / 60), "cpu")
    policy = build_policy(model, context)
    rollout = settings(urls, health_interval_s=600)
    rollout.sglang.sync.bucket_mib = 0.01  # type: ignore[assignment]
    engine = SGLangEngine(rollout.sglang, urls if context.is_leader else [], policy.architecture.vocab_size, 128)
    transport = _transport(rollout, [], model, context, folder)
    sync = ServerSync(WeightPush(engine, transport, None, context.barrier), "leader", context)
    seen = []
    for version in (1, 2):
        metrics = sync(lambda to: stream_hf(policy.model, policy.architecture, context, to=to), version)
        seen.append({"metrics": metrics, "states": [replica.state for replica in engine.replicas]})
    engine.close()
    return seen


@pytest.mark.fault(
    "of two servers one is slow and one hangs",
    phase="weight update",
    seen="a warning; the one that hangs is taken out",
    lost="nothing",
)
def test_a_sync_outlasts_a_slow_server_and_goes_on_without_one_that_hangs(tmp_path: Path) -> None:
    model, never = make_checkpoint("llama", tmp_path), Event()
    slow, hangs = StandIn(), StandIn()
    hangs.faults["/update_weights_from_tensor"] = [None, held(never)]
    slow.faults["/pause_generation"] = [None, delay(SLOW_S)]
    with serving(slow), serving(hangs):
        leader, other = run_ranks(2, two_syncs, model, tmp_path, [slow.url, hangs.url])
        never.set()
    assert leader[0]["states"] == leader[1]["states"] == ["serving", "down"]
    assert leader[1]["metrics"]["sync/transfer_s"] >= SLOW_S > COLLECTIVE_S
    assert slow.version.endswith("-2") and other[1]["metrics"] == leader[1]["metrics"]
