"""The experts that a real server says its tokens went to, against `transformers`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from one_engine import VOCAB, collect, completions, one_engine, request
from recipes import make_model
from safetensors.torch import load_file
from server_tools import LiveServer
from transformers import AutoModelForCausalLM

from megatron_hdpo.rollout.build import check_returns_experts
from megatron_hdpo.rollout.sglang.answers import ExpertChoice
from megatron_hdpo.rollout.sglang.servers.command import ServerLaunch
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.rollout.sglang.servers.server import ServerProcess
from megatron_hdpo.types.rollouts import Completion

pytestmark = pytest.mark.slow

CHOICE = ExpertChoice(layers=2, experts=8, per_token=2)
PROMPTS = [(2, 3, 4, 5, 6), (2, 3, 4, 7)]


@pytest.fixture(scope="module")
def served(sglang_config: ServerConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("experts")
    model = make_model(folder / "model", family="qwen3_moe", characters="0123456789+=#-")
    process = ServerProcess(sglang_config, ServerLaunch(model, "cpu", routed_experts=True), folder)
    try:
        process.start()
        process.wait_ready()
        yield LiveServer(model, process)
    finally:
        process.close()


def weights(path: Path, version: int) -> dict[str, torch.Tensor]:
    """By their names in a checkpoint; the routers of one version like other experts than those of the next."""
    tensors = load_file(path / "model.safetensors")
    return {n: t.roll(version, 0) if n.endswith("mlp.gate.weight") else t for n, t in tensors.items()}


def experts_by_transformers(path: Path, version: int, prompt: np.ndarray, completion: Completion) -> np.ndarray:
    """[P + T - 1, layers, K], sorted."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.copy_(layer.mlp.gate.weight.roll(version, 0))
        ids = torch.tensor([*prompt.tolist(), *completion.token_ids[:-1].tolist()])
        logits = model(ids[None], output_router_logits=True).router_logits
    return torch.stack([of_layer.topk(CHOICE.per_token).indices for of_layer in logits], dim=1).sort(-1).values.numpy()


def test_experts_are_those_of_transformers(served: LiveServer) -> None:
    """Also of prompts that begin alike, whose keys and values come from a cache, and after new weights."""
    with one_engine([served.url], gate=False, experts=CHOICE) as (engine, push):
        for version in range(2):
            push.push(iter(weights(served.model, version).items()), version)
            found = []
            for turn in range(2):
                for prompt in PROMPTS:
                    asked = request(
                        f"{version}{turn}{len(prompt)}#0", n=2, tokens=12, prompt=prompt, routed_experts=True
                    )
                    found += [(asked.prompt_ids, c) for c in completions(collect(engine, [asked]))]
            for prompt_ids, completion in found:
                assert completion.routed_experts is not None
                wanted = experts_by_transformers(served.model, version, prompt_ids, completion)
                assert (np.sort(completion.routed_experts, axis=-1) == wanted).all()
        (plain,) = completions(collect(engine, [request("plain#0")]))
        assert plain.routed_experts is None and plain.token_ids.max() < VOCAB


def test_a_server_that_cannot_tell_is_not_asked(served: LiveServer) -> None:
    with one_engine([served.url], gate=False, experts=CHOICE) as (engine, _):
        replica = engine.replicas[0]
        check_returns_experts(engine)
        replica.info = dataclasses.replace(replica.info, routed_experts=False)
        with pytest.raises(ValueError, match="without --enable-return-routed-experts"):
            engine.submit([request(routed_experts=True)])
        with pytest.raises(ValueError, match=f"{served.url} cannot return the experts"):
            check_returns_experts(engine)
    with one_engine([served.url], gate=False) as (engine, _), pytest.raises(ValueError, match="model has no experts"):
        engine.submit([request(routed_experts=True)])
