"""The loaded Megatron model, packed and on every layout, against `transformers` on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed_helper import run_ranks
from tiny_checkpoints import CASES, build, layout, make_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_hdpo.weights.load import load_hf
from megatron_hdpo.weights.logprobs import packed_logprobs

LENGTHS = (1, 37, 5, 120)
SEQUENCE: dict[str, Any] = {"tensor": 2, "sequence": True}
TWO_RANKS: list[dict[str, Any]] = [{}, {"tensor": 2}, SEQUENCE, {"pipeline": 2, "virtual_stages": 2}, {"context": 2}]
FOUR_RANKS = [{"tensor": 2, "pipeline": 2}, SEQUENCE | {"pipeline": 2}, SEQUENCE | {"context": 2}]


def _sequences() -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    return [generator.integers(0, 499, length) for length in LENGTHS]


def _logprobs(checkpoints: dict[str, Path], layouts: list[dict[str, Any]]) -> dict[str, list[torch.Tensor]]:
    """Log-probs of every case at every layout, keyed by both; from the leader alone."""
    found = {}
    for sizes in layouts:
        with layout(**{"tensor": 1, "pipeline": 1} | sizes) as context:
            for case, path in checkpoints.items():
                model, architecture = build(path, context)
                load_hf(model, architecture, context, path)
                result = packed_logprobs(model, architecture, context, _sequences())
                if context.rank == 0:
                    found[f"{case} at {sizes}"] = result
    return found


def _check_rope_scaling_matters(path: Path, scaled: list[torch.Tensor]) -> None:
    config = AutoConfig.from_pretrained(path)
    config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    model = AutoModelForCausalLM.from_pretrained(path, config=config)
    with torch.no_grad():
        unscaled = torch.log_softmax(model(torch.from_numpy(_sequences()[-1])[None]).logits[0], dim=-1)
    assert (unscaled - scaled[-1]).abs().max() > 0.01


def test_logprobs_equal_transformers(tmp_path: Path) -> None:
    checkpoints, references = {}, {}
    for case in CASES:
        checkpoints[case] = tmp_path / case
        model = make_checkpoint(case, checkpoints[case])
        with torch.no_grad():
            inputs = [torch.from_numpy(ids)[None] for ids in _sequences()]
            references[case] = [torch.log_softmax(model(ids).logits[0], dim=-1) for ids in inputs]
    _check_rope_scaling_matters(checkpoints["llama_tied_rope3"], references["llama_tied_rope3"])
    found = run_ranks(2, _logprobs, checkpoints, TWO_RANKS)[0] | run_ranks(4, _logprobs, checkpoints, FOUR_RANKS)[0]
    assert len(found) == len(TWO_RANKS + FOUR_RANKS) * len(CASES)
    for key, logprobs in found.items():
        for ours, theirs in zip(logprobs, references[key.split()[0]], strict=True):
            assert ours.std() > 0.5, "logits this flat would agree by luck"
            torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
