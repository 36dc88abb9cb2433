"""Servers of two ranks, and of Qwen2 and Qwen3: weights by each path, the gate, log-probs as transformers has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from one_engine import TOLERANCE, Weights, collect, completions, one_engine, request
from recipes import make_model
from server_tools import LiveServer, is_scheduler, serves, session_processes
from transformers import AutoModelForCausalLM

from megatron_hdpo.rollout.sglang.servers.command import ServerLaunch
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.rollout.sglang.servers.server import ServerProcess
from megatron_hdpo.rollout.sglang.weights.gate import GateError
from megatron_hdpo.rollout.sglang.weights.transports import BroadcastTransport, DiskTransport, TensorTransport

pytestmark = pytest.mark.slow

PATHS = ("tensor", "distributed", "disk")


@dataclasses.dataclass(frozen=True)
class Case:
    """A server. parameters: some that its gate must know."""

    family: str
    ranks: int
    kv_heads: int
    tied: bool
    parameters: tuple[str, ...]


CASES = {
    # Biases of query, key and value. (On a CPU SGLang pads heads that ranks do not divide: no such case here.)
    "qwen2, TP 2": Case("qwen2", 2, 2, False, ("layers.1.self_attn.k_proj.bias", "lm_head.weight")),
    "qwen3, tied": Case("qwen3", 1, 2, True, ("layers.1.self_attn.q_norm.weight", "embed_tokens.weight")),
}


def made(case: Case, folder: Path) -> Path:
    """A checkpoint whose biases and norms are no defaults: at those a mix-up would go unseen."""
    model_path = make_model(folder, family=case.family, kv_heads=case.kv_heads, tied=case.tied)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.4)
    model.save_pretrained(model_path)
    return model_path


@pytest.fixture(scope="module", params=list(CASES))
def served(
    request: pytest.FixtureRequest, sglang_config: ServerConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Case, LiveServer, Weights]]:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("served")
    model = made(case, folder / "model")
    config = sglang_config.model_copy(update={"tensor_parallel": case.ranks})
    process = ServerProcess(config, ServerLaunch(model, "cpu"), folder)
    try:
        process.start()
        process.wait_ready()
        yield case, LiveServer(model, process), Weights(model)
    finally:
        process.close()


def stream(case: Case, weights: Weights, version: int) -> Iterator[tuple[str, torch.Tensor]]:
    """As the trainer sends it: a tied head goes as the embedding alone."""
    return ((n, t) for n, t in weights.stream(version) if not (case.tied and n == "lm_head.weight"))


def test_every_rank_has_a_scheduler(served: Any) -> None:
    case, server, _ = served
    assert sum(is_scheduler(process) for process in session_processes(server.process.pid)) == case.ranks


def test_weights_arrive_by_each_path(served: Any, tmp_path: Path) -> None:
    case, server, weights = served
    transports = (
        TensorTransport(600.0),
        BroadcastTransport(600.0, torch.device("cpu")),
        DiskTransport(600.0, tmp_path / "sync", server.model),
    )
    prompt = request().prompt_ids
    with one_engine([server.url], kv_heads=case.kv_heads) as (engine, push):
        assert engine.replicas[0].info.tensor_parallel == case.ranks
        push.config.bucket_mib = 0.01  # type: ignore[assignment]
        for version, transport in enumerate(transports):
            push.transport = transport
            report = push.push(stream(case, weights, version), version)
            assert report.servers == 1
            samples = completions(collect(engine, [request(n=4, tokens=20, top_logprobs=3)]))
            assert {int(v) for sample in samples for v in sample.weight_versions} == {version}
            assert max(weights.worst(prompt, sample, version) for sample in samples) < TOLERANCE
            if transport is transports[1]:
                push.close()


def test_the_gate_sees_one_number_that_is_wrong(served: Any) -> None:
    case, server, weights = served
    transport = TensorTransport(600.0)
    with one_engine([server.url], kv_heads=case.kv_heads) as (engine, push):
        for name in (*case.parameters, "layers.0.mlp.down_proj.weight", "layers.1.post_attention_layernorm.weight"):

            def spoiled(bucket: Any, name: str = name) -> Any:
                changed = [(n, t.clone()) for n, t in bucket]
                for n, tensor in changed:
                    if n.endswith(name):
                        tensor.view(-1)[-1] += 1e-3
                return TensorTransport.prepare(transport, changed)

            transport.prepare = spoiled  # type: ignore[method-assign]
            push.transport = transport
            served_name = name.replace("k_proj", "qkv_proj")
            with pytest.raises(GateError, match=rf"step 5: server {server.url}.*{served_name} has checksum"):
                push.push(stream(case, weights, 5), 5)
            assert not serves(engine)
        del transport.prepare
        push.push(stream(case, weights, 6), 6)
        assert serves(engine)
