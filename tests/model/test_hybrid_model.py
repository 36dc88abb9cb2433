"""The policy on Megatron's HybridModel does what it does on the deprecated GPTModel, bit for bit.

The first step of docs/hybrid-model.md: same checkpoint, same tables of weights, same loss; another network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed_helper import run_ranks
from layout_cases import share
from megatron.core import __version__ as megatron_version
from packaging.version import Version
from tiny_policy import (
    MODELS,
    OPTIMIZER,
    SPEC,
    build_policy,
    gradients_of,
    joined,
    make_checkpoint,
    make_examples,
    make_scorings,
    weights_of,
)

from megatron_hdpo.model.architecture import read_architecture

pytestmark = pytest.mark.skipif(
    Version(megatron_version) < Version("0.19"),
    reason=f"HybridModel takes the place of GPTModel from Megatron-Core 0.19 on; this is {megatron_version}",
)

# With wavelengths that Llama 3's scaling changes: beyond 8192 tokens.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ALL = (*MODELS, "llama3")
EXPERTS = ("qwen3_moe",)
# name: (world size, layout, models)
CASES: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "one_rank": (1, {}, ALL),
    "tp2": (2, {"tensor": 2}, tuple(name for name in ALL if name not in EXPERTS)),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}, ("llama", *EXPERTS)),
    "pp2": (2, {"pipeline": 2}, ("qwen2", "llama_tied")),
    "cp2": (2, {"context": 2}, ("qwen3_tied",)),
    "ep2": (2, {"expert": 2}, EXPERTS),
}


def _llama3(folder: Path) -> Path:
    path = make_checkpoint("llama", folder / "scaled")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rope_parameters": LLAMA3}))
    assert read_architecture(path).rope_scaling == LLAMA3["factor"]
    return path


def _outcomes(layout: dict[str, Any], paths: list[Path]) -> list[list[dict[str, Any]]]:
    """For each model what its policy computes on GPTModel, then on HybridModel."""
    from hybrid_policy import build_hybrid_policy, hybrid_weights

    with joined(**layout) as context:
        return [
            [
                _outcome(build_policy(path, context, optimizer=OPTIMIZER), weights_of),
                _outcome(build_hybrid_policy(path, context, optimizer=OPTIMIZER), hybrid_weights),
            ]
            for path in paths
        ]


def _outcome(policy: Any, read_weights: Any) -> dict[str, Any]:
    scores = policy.score(make_scorings()[policy.context.dp_rank :: policy.context.dp_size])
    policy.accumulate_gradients(share(policy, make_examples()), SPEC)
    outcome = {"gradients": gradients_of(policy), "logprobs": {key: s.logprobs_T for key, s in scores.items()}}
    outcome["metrics"] = {
        name: float(value) for name, value in policy.update(share(policy, make_examples()), SPEC).items()
    }
    return outcome | {"network": type(policy.model).__name__, "weights": read_weights(policy)}


@pytest.mark.parametrize("case", CASES)
def test_policy_computes_the_same_on_both_networks(case: str, tmp_path: Path) -> None:
    size, layout, models = CASES[case]
    paths = [_llama3(tmp_path) if model == "llama3" else make_checkpoint(model, tmp_path) for model in models]
    for rank in run_ranks(size, _outcomes, layout, paths):
        for model, (gpt, hybrid) in zip(models, rank, strict=True):
            assert (gpt["network"], hybrid["network"]) == ("HeadlessGPTModel", "HeadlessHybridModel")
            assert gpt["metrics"] == hybrid["metrics"], model
            assert any(np.any(gradient) for gradient in gpt["gradients"].values())
            for what in ("gradients", "weights", "logprobs"):
                assert gpt[what].keys() == hybrid[what].keys()
                differ = [name for name, value in gpt[what].items() if not np.array_equal(value, hybrid[what][name])]
                assert not differ, f"{model}: {what} differ: {differ}"
