"""The norm that gradients are clipped by: it is Megatron's, and of all parameters.

It counts all experts too, whatever marks an expert's layer leaves on its parameters.
Megatron-Core before 0.19.2 omits experts that carry no mark if tensor and expert parallelism are used together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_helper import run_ranks
from full_logits import (
    Reference,
    assert_same_tensors,
    by_saved_name,
    first_step_of_adamw,
    load,
    norm,
    reference_step,
)
from layout_cases import share
from megatron.core import __version__ as megatron_version
from megatron.core.optimizer import DistributedOptimizer
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from packaging.version import Version
from tiny_policy import OPTIMIZER, SPEC, build_policy, joined, make_checkpoint, make_examples, weights_of
from torch import Tensor, nn

from megatron_hdpo.model import build, optimizer, specs
from megatron_hdpo.model.gradient_norm import gradient_norm

Sizes = dict[str, int]
TENSOR = {"tensor": 2, "sequence": True}
# On four ranks. Without an entry for experts, every rank holds all of them, whole.
LAYOUTS: list[Sizes] = [
    {"expert": 2},
    {"expert": 4},
    {"expert": 2, "expert_tensor": 2},
    {"expert_tensor": 2},
    {},
]
OMITS_UNMARKED = Version(megatron_version) < Version("0.19.2")


class _Unmarked(nn.Module):
    """A rank's shard of an expert's linear layer without Megatron's mark on its weight; it communicates nothing."""

    split = 0

    def __init__(self, input_size: int, output_size: int, *, config: Any, is_expert: bool, **_: Any) -> None:
        super().__init__()
        assert is_expert
        shape = [output_size, input_size]
        shape[self.split] //= config.expert_tensor_parallel_size
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
        self.weight.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.linear(x, self.weight), None


class _UnmarkedRows(_Unmarked):
    split = 1


def _spec_without_marks(*args: Any) -> TransformerBlockSubmodules:
    block = specs.layer_spec(*args)
    for layer in block.layer_specs:
        experts = layer.submodules.mlp.submodules.experts
        experts.submodules = MLPSubmodules(linear_fc1=_Unmarked, linear_fc2=_UnmarkedRows)
    return block


def _step(path: Path, layouts: list[Sizes], distributed: bool) -> list[tuple[float, dict[str, np.ndarray]]]:
    """Return for each layout the norm and the weights of one update; in a world of its own, since it patches."""
    build.layer_spec = _spec_without_marks  # type: ignore[assignment]
    for module, name in ((build, "DistributedDataParallelConfig"), (optimizer, "MegatronOptimizerConfig")):
        setattr(module, name, _with(getattr(module, name), use_distributed_optimizer=distributed))
    results = []
    for sizes in layouts:
        with joined(**TENSOR, **sizes) as context:
            policy = build_policy(path, context, optimizer=OPTIMIZER)
            assert {isinstance(p, DistributedOptimizer) for p in policy.optimizer.chained_optimizers} == {distributed}
            metrics = policy.update(share(policy, make_examples()), SPEC)
            results.append((metrics["train/grad_norm"], weights_of(policy)))
    return results


def _with(config: Any, **settings: Any) -> Any:
    return lambda **others: config(**(others | settings))


def _without_our_marks(path: Path, layouts: list[Sizes]) -> list[float]:
    build._mark_experts = lambda *_: None  # type: ignore[assignment]
    return [total for total, _ in _step(path, layouts, True)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return reference_step(checkpoint, make_examples(), SPEC)


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed_optimizer", "plain_optimizer"])
def test_all_experts_count_in_norm_and_clipping(checkpoint: Path, reference: Reference, distributed: bool) -> None:
    total = norm(reference.gradients)
    assert total > OPTIMIZER.clip_grad
    before = by_saved_name({name: p.detach().numpy() for name, p in load(checkpoint).named_parameters()})
    moved = first_step_of_adamw(reference.gradients, before, OPTIMIZER)
    for rank in run_ranks(4, _step, checkpoint, LAYOUTS, distributed, fresh=True):
        for sizes, (found, weights) in zip(LAYOUTS, rank, strict=True):
            assert found == pytest.approx(total, rel=1e-5), sizes
            assert_same_tensors({name: weights[name] - before[name] for name in before}, moved, 1e-4)


def test_megatron_alone_omits_unmarked_experts(checkpoint: Path, reference: Reference) -> None:
    """Why the build marks them. With two expert-parallel ranks, the second half of the experts is on the second rank of
    each tensor-parallel group."""
    of_second_rank = ("experts.2.", "experts.3.")
    seen = {n: g for n, g in reference.gradients.items() if not any(part in n for part in of_second_rank)}
    assert norm(seen) < 0.99 * norm(reference.gradients)
    expected = norm(seen if OMITS_UNMARKED else reference.gradients)
    for found in run_ranks(4, _without_our_marks, checkpoint, [{"expert": 2}], fresh=True):
        assert found == [pytest.approx(expected, rel=1e-5)]


def _both_norms(path: Path) -> tuple[float, float]:
    """The norm of one step's gradients by Megatron's own method and by `gradient_norm`."""
    with joined() as context:
        policy = build_policy(path, context, optimizer=OPTIMIZER)
        policy.accumulate_gradients(make_examples()[:3], SPEC)
        assert policy.optimizer is not None
        with context.megatron_calls(), torch.no_grad():
            policy.optimizer.prepare_grads()
            return float(policy.optimizer.get_grad_norm()), gradient_norm(policy.optimizer, context.device)


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_the_norm_is_megatrons_bit_for_bit(name: str, tmp_path: Path) -> None:
    ((expected, found),) = run_ranks(1, _both_norms, make_checkpoint(name, tmp_path))
    assert found == expected > 0
