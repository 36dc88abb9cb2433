"""What a mixture's layers hold on to after a step."""

from __future__ import annotations

import pytest
from distributed_helper import run_ranks
from megatron.core.transformer.moe.moe_layer import MoELayer
from recorded import build, examples
from tiny_policy import joined

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.types.learning import DivergenceConfig, LossSpec, SurrogateConfig

MIXTURE = Architecture(
    "qwen3_moe", 2, 64, 176, 8, 2, 8, 400, 4096, 1e-6, 1e4, None, False, True, False,
    num_experts=4, experts_per_token=2, expert_ffn_size=48,
)  # fmt: skip


def dispatchers_with_a_graph(recompute: str) -> list[bool]:
    """Whether each layer's dispatcher still holds a graph after one step."""
    with joined() as context:
        policy = build(MIXTURE, context, 128, 64, recompute=recompute)
        spec = LossSpec(SurrogateConfig(), DivergenceConfig(top_k=8), temperature=1.0)
        policy.update(examples(2, 24, 40, 8, MIXTURE.vocab_size), spec)
        layers = [module for module in policy.model.modules() if isinstance(module, MoELayer)]
        return [layer.token_dispatcher.probs.requires_grad for layer in layers]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_no_dispatcher_holds_a_graph_after_a_step(recompute: str) -> None:
    """A graph would hold the input of its layer and, of a recomputed one, the input's gradient."""
    assert run_ranks(1, dispatchers_with_a_graph, recompute) == [[False, False]]
