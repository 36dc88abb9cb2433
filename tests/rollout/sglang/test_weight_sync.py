"""Weights of a trainer on several ranks reach a real server by each path, and its log-probs are the trainer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed_helper import run_ranks
from server_tools import LiveServer, serves
from sglang_ranks import engine_on, policy_on, push, sampled_groups, scale_weights, worst_difference

PATHS = ("tensor", "distributed", "disk")
TOLERANCE = 1e-4


def push_and_compare(url: str, model: Path, folder: Path, layout: dict[str, int]) -> list[dict[str, Any]]:
    """By each path twice, always with other weights; in buckets of several tensors."""
    seen = []
    with policy_on(model, **layout) as policy:
        for p, path in enumerate(PATHS):
            with engine_on([url], policy, model, folder, sync={"path": path, "bucket_mib": 1}) as built:
                built.sync.push.config.bucket_mib = 0.01  # type: ignore[attr-defined]
                for turn in range(2):
                    scale_weights(policy, 0.9 if turn else 1.2)
                    version = 10 * p + turn
                    metrics = push(built, policy, version)
                    groups = sampled_groups(built, policy.context)
                    versions = {int(v) for g in groups for s in g.samples for v in s.completion.weight_versions}
                    own, top, tokens = worst_difference(policy, groups)
                    seen.append({"path": path, "own": own, "top": top, "tokens": tokens, "metrics": metrics})
                    assert versions == {version}
                    assert own < TOLERANCE and top < TOLERANCE, (path, turn, own, top)
    return seen


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"tensor": 2, "pipeline": 2}], ids=["alone", "TP2", "TP2xPP2"])
def test_servers_follow_the_trainer_by_every_path(
    sglang_server: LiveServer, tmp_path: Path, layout: dict[str, int]
) -> None:
    ranks = int(np.prod([*layout.values(), 1]))
    results = run_ranks(ranks, push_and_compare, sglang_server.url, sglang_server.model, tmp_path, layout)
    first = results[0]
    assert [entry["path"] for entry in first] == [path for path in PATHS for _ in range(2)]
    assert all(entry["tokens"] >= 8 for entry in first), "a token of each of the samples at least"
    sizes = {entry["metrics"]["sync/bytes"] for entry in first}
    assert len(sizes) == 1 and sizes.pop() > 50_000, "the same tensors by each path, each once"
    assert results == [first] * ranks
    assert not list(tmp_path.glob("sync/*/*")), "the folder of path=disk is emptied"


def sample_at(url: str, model: Path, folder: Path, temperature: float) -> tuple[float, float, int]:
    with policy_on(model, tensor=2) as policy, engine_on([url], policy, model, folder) as built:
        push(built, policy, 3)
        return worst_difference(policy, sampled_groups(built, policy.context, temperature), temperature)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_log_probs_at_another_temperature(sglang_server: LiveServer, tmp_path: Path, temperature: float) -> None:
    """The server's are of log_softmax(logits / T), as the surrogate wants them."""
    own, top, tokens = run_ranks(2, sample_at, sglang_server.url, sglang_server.model, tmp_path, temperature)[0]
    assert own < TOLERANCE and top < TOLERANCE and tokens >= 8


def push_wrong(url: str, model: Path, folder: Path) -> list[str]:
    """The gate must name the tensor that a server did not get as it was sent."""
    from megatron_hdpo.model.policy import TrainingError

    messages = []
    with policy_on(model, tensor=2) as policy, engine_on([url], policy, model, folder) as built:
        for name in ("model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight", "lm_head.weight"):
            transport = built.sync.push.transport  # type: ignore[attr-defined]
            prepare = type(transport).prepare

            def spoiled(bucket: Any, name: str = name, transport: Any = transport, prepare: Any = prepare) -> Any:
                return prepare(transport, [(n, t + 1e-3 if n == name else t) for n, t in bucket])

            transport.prepare = spoiled
            try:
                push(built, policy, 5)
            except TrainingError as error:
                messages.append(str(error))
            del transport.prepare
        assert not serves(built.engine), "what failed the gate serves nothing"
        push(built, policy, 6)
        own, _, _ = worst_difference(policy, sampled_groups(built, policy.context))
        assert own < TOLERANCE
    return messages


def test_the_gate_names_tensor_server_and_step(sglang_server: LiveServer, tmp_path: Path) -> None:
    messages, others = run_ranks(2, push_wrong, sglang_server.url, sglang_server.model, tmp_path)
    assert messages == others and len(messages) == 3
    for message, name in zip(messages, ("layers.1.self_attn.qkv_proj", "embed_tokens", "lm_head"), strict=True):
        assert name in message and sglang_server.url in message and "step 5" in message
        assert "nothing is trained" in message
