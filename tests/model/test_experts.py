"""Experts under the training core: what the optimizer is told about them, and how even the routers' loads are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks
from megatron.core.transformer.moe.moe_layer import MoELayer
from tiny_policy import SPEC, build_policy, joined, make_examples, make_scorings
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from megatron_hdpo.model.chunks import chunks_of
from megatron_hdpo.model.router import RouterStatistics

EXPERTS, PER_TOKEN, LAYERS = 4, 2, 2
LAYOUTS: list[dict[str, Any]] = [
    {"expert": 2},
    {"tensor": 2, "sequence": True},
    {"tensor": 2, "sequence": True, "expert_tensor": 2},
    {"tensor": 2, "sequence": True, "expert": 2},
    {"context": 2, "expert": 2},
    {"pipeline": 2},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layer's router sees a constant and likes experts 1 and 3; the second one's loads are random."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=299,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
        first = model.model.layers[0]
        first.mlp.gate.weight.zero_()
        first.mlp.gate.weight[1, 0], first.mlp.gate.weight[3, 0] = 5.0, 5.0
        model.model.embed_tokens.weight[:, 0] = 9.0
        first.self_attn.o_proj.weight[0] = 0.0
    path = tmp_path_factory.mktemp("experts") / "qwen3_moe"
    model.save_pretrained(path)
    return path


def _marks(path: Path, layouts: list[dict[str, Any]]) -> list[bool]:
    """Return for each layout whether every weight of its experts has the expected marks."""
    found = []
    for sizes in layouts:
        with joined(**sizes) as context:
            policy = build_policy(path, context)
            together = sizes.get("expert", 1) == 1 and sizes.get("expert_tensor", 1) == sizes.get("tensor", 1)
            weights = [
                parameter
                for layer in policy.model.modules()
                if isinstance(layer, MoELayer)
                for parameter in layer.experts.parameters()
            ]
            buffers = [buffer for chunk in chunks_of(policy.ddp) for buffer in chunk.expert_parallel_buffers]
            assert all(buffer.data_parallel_group.size() == context.groups.expt_dp.size() for buffer in buffers)
            reduced_apart = {id(parameter) for buffer in buffers for parameter in buffer.params}
            found.append(
                len(weights) > 0
                and all(parameter.tensor_model_parallel for parameter in weights)
                and {id(parameter) in reduced_apart for parameter in weights} == {not together}
            )
    return found


def test_experts_are_no_copies_and_are_reduced_over_the_ranks_that_have_them(checkpoint: Path) -> None:
    """The gradient norm would count what is not marked as a shard on one tensor-parallel rank alone."""
    for found in run_ranks(2, _marks, checkpoint, LAYOUTS):
        assert found == [True] * len(LAYOUTS)


def _statistics(path: Path, layouts: list[dict[str, Any]], recompute: bool) -> list[dict[str, float]]:
    found = []
    for sizes in layouts:
        with joined(**sizes) as context:
            policy = build_policy(path, context, recompute=recompute, budget=1000)
            statistics = RouterStatistics(policy.model)
            assert statistics.metrics(context) == {}
            policy.score(make_scorings()[context.dp_rank :: context.dp_size])
            assert statistics.metrics(context) == {}, "scoring is not training"
            policy.accumulate_gradients(make_examples()[context.dp_rank :: context.dp_size], SPEC)
            found.append(statistics.metrics(context))
            assert statistics.metrics(context) == {}, "the next step begins at zero"
    return found


def _loads(path: Path) -> torch.Tensor:
    """Tokens of each layer's experts by `transformers`, [layers, experts]."""
    model = AutoModelForCausalLM.from_pretrained(path)
    counts = torch.zeros(LAYERS, EXPERTS, dtype=torch.float64)
    for example in make_examples():
        if example.inert:
            continue
        ids = torch.tensor([*example.prompt_ids.tolist(), *example.response_ids.tolist()])
        with torch.no_grad():
            output = model(ids[None], output_router_logits=True)
        for layer, logits in enumerate(output.router_logits):
            counts[layer] += torch.nn.functional.one_hot(logits.topk(PER_TOKEN).indices, EXPERTS).sum(dim=(0, 1))
    return counts


def _expected(path: Path) -> dict[str, float]:
    shares = _loads(path) / _loads(path).sum(dim=1, keepdim=True)
    loads = (shares.max(dim=1).values * EXPERTS).tolist()
    entropies = [-sum(s * math.log(s) for s in row if s) / math.log(EXPERTS) for row in shares.tolist()]
    return {
        "router/max_load": sum(loads) / LAYERS,
        "router/max_load_worst": max(loads),
        "router/entropy": sum(entropies) / LAYERS,
        "router/entropy_worst": min(entropies),
    }


def test_router_statistics(checkpoint: Path) -> None:
    expected = _expected(checkpoint)
    assert expected["router/max_load_worst"] == pytest.approx(EXPERTS / PER_TOKEN)
    assert expected["router/entropy_worst"] == pytest.approx(0.5)
    assert run_ranks(1, _statistics, checkpoint, [{}], True) == [[pytest.approx(expected, rel=1e-6)]]
    ranks = run_ranks(2, _statistics, checkpoint, LAYOUTS, False)
    assert ranks[0] == ranks[1]
    for sizes, found in zip(LAYOUTS, ranks[0], strict=True):
        # Rows of padding are counted: a few among a hundred.
        exact = not sizes.get("context") and not sizes.get("sequence")
        assert found == pytest.approx(expected, rel=1e-6 if exact else 0.1), sizes
