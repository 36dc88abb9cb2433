"""Runs whose trainer follows the engine's experts: what it does to the mismatch, what is saved, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import Ended, results_of, run_command
from recipes import Tree, make_model, small_recipe
from transformers import AutoModelForCausalLM

from megatron_hdpo.sampling.saved import read_groups, step_file
from megatron_hdpo.tracking.metrics import read_metrics
from megatron_hdpo.training.rollout_phase import check_experts
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, Group, Sample

LAYERS, PER_TOKEN = 2, 2
STEP = step_file(1, 0)


def undecided_model(path: Path) -> Path:
    """Its routers like all experts almost equally, so that the engine's rounding tips them."""
    make_model(path, family="qwen3_moe", experts=8, layers=LAYERS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            gate = layer.mlp.gate.weight
            gate.copy_(gate[:1] + 2e-3 * torch.randn_like(gate))
    model.save_pretrained(path)
    return path


def train(model: Path, output: Path, ranks: int = 1, parallel: Any = None, **rollout: Any) -> Ended:
    """One step of two updates; the engine computes in bfloat16, the trainer in float32. The loss is a distillation of
    the student's rollouts, which needs no right answers."""
    tree: Tree = small_recipe(model, output)
    tree["objective"] = {"name": "opsd", "distill": {"top_k": 8, "importance_cap": 2.0}}
    tree["teacher"] = {"kind": "policy"}
    tree["train"] |= {"steps": 1, "updates_per_step": 2}
    tree["rollout"] |= {"embedded": {"dtype": "bfloat16"}} | rollout
    tree["self_test"] = {"prompts": 8, "max_new_tokens": 8}
    tree |= {"checkpoint": {"export": False}, "tracking": {"tensorboard": False}, "parallel": parallel or {}}
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return run_command("train", str(path), ranks=ranks)


def test_a_run_with_the_engines_experts(tmp_path: Path) -> None:
    """Fed with its own saved rollouts it makes the same step, on a pipeline too. A run without them ends at the
    self-test: engine and trainer are two models."""
    model = undecided_model(tmp_path / "model")
    lived, again, saved = tmp_path / "lived", tmp_path / "again", tmp_path / "lived" / "rollouts"
    results_of(train(model, lived, routing_replay=True))
    for group in read_groups(saved / STEP):
        check_experts(group, (LAYERS, PER_TOKEN), saved)
    results_of(train(model, again, 2, {"pipeline": 2}, routing_replay=True, replay=str(saved)))
    for name in ("train/grad_norm", "distill/divergence"):
        assert read_metrics(again)[-1][name] == pytest.approx(read_metrics(lived)[-1][name], rel=1e-4), name
    assert "engine and trainer disagree on the log-probs" in train(model, tmp_path / "without").text


def _group(experts: np.ndarray | None) -> Group:
    ids = np.arange(3, dtype=np.int32)
    completion = Completion(ids, ids.astype(np.float32), "stop", ids, routed_experts=experts)
    return Group(Problem("sums/0", "sums", "2 + 2?", "4"), np.arange(4, dtype=np.int32), [Sample(completion, "", 1.0)])


EXPERTS = np.zeros((6, LAYERS, PER_TOKEN), dtype=np.uint8)


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        (None, "has no experts for rollout.routing_replay"),
        (EXPERTS[:-1], r"experts of shape \(5, 2, 2\), not \(6, 2, 2\)"),
        (EXPERTS[:, :1], r"experts of shape \(6, 1, 2\)"),
    ],
)
def test_saved_rollouts_without_the_experts_are_refused(experts: np.ndarray | None, words: str) -> None:
    with pytest.raises(DataError, match=f"file: problem sums/0 .*{words}"):
        check_experts(_group(experts), (LAYERS, PER_TOKEN), Path("file"))


def test_saved_experts_that_are_not_wanted_are_dropped() -> None:
    group = _group(EXPERTS)
    before = group.samples[0].completion
    check_experts(group, None, Path("file"))
    assert group.samples[0].completion == replace(before, routed_experts=None)
