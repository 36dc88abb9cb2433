"""Reading the architecture of models with experts, and refusing unsupported ones."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Qwen3MoeConfig

from megatron_hdpo.model.architecture import ArchitectureError, parse_architecture

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
}


def _config(**changes: Any) -> dict[str, Any]:
    return Qwen3MoeConfig(**SIZES).to_dict() | {"architectures": ["Qwen3MoeForCausalLM"]} | changes


def test_experts() -> None:
    architecture = parse_architecture(_config())
    assert (architecture.num_experts, architecture.experts_per_token) == (8, 3)
    assert (architecture.expert_ffn_size, architecture.ffn_size) == (20, 48)
    assert architecture.normalised_routing and architecture.qk_norm and not architecture.qkv_bias
    assert not parse_architecture(_config(norm_topk_prob=False)).normalised_routing
    assert parse_architecture(_config(norm_topk_prob=False, num_experts_per_tok=1)).experts_per_token == 1


@pytest.mark.parametrize("written", ["num_experts", "num_local_experts"])
def test_either_name_of_the_number_of_experts(written: str) -> None:
    """transformers 4 and 5 write different ones."""
    config = {key: value for key, value in _config().items() if key not in ("num_experts", "num_local_experts")}
    assert parse_architecture(config | {written: 6}).num_experts == 6
    with pytest.raises(KeyError, match="num_local_experts"):
        parse_architecture(config)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported: every layer needs experts"),
        ({"mlp_only_layers": [0, 3]}, r"mlp_only_layers=\[0, 3\] is not supported: every layer needs experts"),
        ({"shared_expert_intermediate_size": 64}, "shared experts are not supported"),
        ({"n_shared_experts": 1}, "shared experts are not supported"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 is not between 1 and the 8 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 is not between 1 and the 8 experts"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1 with norm_topk_prob=true is not supported"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ArchitectureError, match=f"^here: {text}"):
        parse_architecture(_config(num_local_experts=8, **changes), "here")
