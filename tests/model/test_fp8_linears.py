"""Layers with emulated FP8: on which ranks they give what one rank gives, and which modules of a model they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_helper import run_ranks
from layout_cases import share
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import build_module
from tiny_policy import OPTIMIZER, SPEC, build_policy, joined, make_checkpoint, make_examples, make_scorings, weights_of

from megatron_hdpo.model.architecture import Architecture, read_architecture
from megatron_hdpo.model.config import ModelConfig
from megatron_hdpo.model.fp8_emulation import RECIPES
from megatron_hdpo.model.fp8_linears import EmulatedColumnParallelLinear, EmulatedRowParallelLinear, linears_of
from megatron_hdpo.model.megatron_config import transformer_config
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.types.learning import Example, LossSpec, SurrogateConfig

EMULATED = (EmulatedColumnParallelLinear, EmulatedRowParallelLinear)
EVERY_RECIPE = pytest.mark.parametrize("name", RECIPES)
HIDDEN, WIDE, ROWS = 256, 512, 64
"""Shards of two ranks are whole blocks of 128."""


def emulation(name: str, **more: Any) -> dict[str, Any]:
    return {"spec": "torch", "fp8_emulation": name} | more


def whole() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    shapes = {"fc1": (WIDE, HIDDEN), "fc2": (HIDDEN, WIDE), "x": (ROWS, 1, HIDDEN), "upstream": (ROWS, 1, HIDDEN)}
    return {name: torch.randn(shape, generator=made) * 0.1 for name, shape in shapes.items()}


def run_pair(name: str, architecture: Architecture, layout: dict[str, Any]) -> dict[str, np.ndarray]:
    """Run a column-parallel layer and the row-parallel one behind it, forward and backward; whole tensors."""
    with joined(**layout) as context, context.megatron_calls():
        section = ModelConfig(path="", dtype="float32", **emulation(name))
        config = transformer_config(architecture, context.layout, section, "torch")
        linears = linears_of(section, 0, 1)
        group, values = context.groups.tp, whole()
        settings: dict[str, Any] = {"config": config, "init_method": None, "bias": False, "tp_group": group}
        fc1 = build_module(linears.column, HIDDEN, WIDE, gather_output=False, **settings)
        settings |= {"skip_bias_add": False, "input_is_parallel": True}
        fc2 = build_module(linears.row, WIDE, HIDDEN, **settings)
        with torch.no_grad():
            fc1.weight.copy_(_shard(values["fc1"], 0, group))
            fc2.weight.copy_(_shard(values["fc2"], 1, group))
        sequence = group if context.layout.sequence else None
        x = _shard(values["x"], 0, sequence).requires_grad_()
        middle, _ = fc1(x)
        output, _ = fc2(middle)
        output.backward(_shard(values["upstream"], 0, sequence))
        return {
            "output": _whole(output, 0, sequence),
            "input": _whole(x.grad, 0, sequence),
            "fc1": _whole(fc1.weight.grad, 0, group),
            "fc2": _whole(fc2.weight.grad, 1, group),
        }


def _shard(tensor: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    return tensor.clone() if group is None else tensor.chunk(group.size(), dim)[group.rank()].clone()


def _whole(tensor: torch.Tensor | None, dim: int, group: Any) -> np.ndarray:
    assert tensor is not None
    tensor = tensor.detach().contiguous()
    if group is None:
        return tensor.numpy()
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    torch.distributed.all_gather(parts, tensor, group=group)
    return torch.cat(parts, dim).numpy()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fp8")
    return {name: make_checkpoint(name, folder) for name in ("qwen2", "qwen3_moe")}


@pytest.fixture(scope="module")
def architecture(checkpoints: dict[str, Path]) -> Architecture:
    return replace(read_architecture(checkpoints["qwen2"]), hidden_size=HIDDEN, ffn_size=WIDE)


def _pairs(architecture: Architecture, layouts: list[dict[str, Any]]) -> dict[str, list[dict[str, np.ndarray]]]:
    return {name: [run_pair(name, architecture, layout) for layout in layouts] for name in RECIPES}


@pytest.fixture(scope="module")
def pairs(architecture: Architecture) -> dict[str, list[dict[str, np.ndarray]]]:
    """By recipe: on one rank, on two, and on two with sequence parallelism."""
    alone = run_ranks(1, _pairs, architecture, [{}])[0]
    layouts = [{"tensor": 2}, {"tensor": 2, "sequence": True}]
    split = run_ranks(2, _pairs, architecture, layouts)[0]
    return {name: alone[name] + split[name] for name in RECIPES}


def differences(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    return {
        name: float(np.linalg.norm(found[name] - value) / np.linalg.norm(value)) for name, value in expected.items()
    }


@pytest.mark.parametrize("name", ["blockwise", "mxfp8"])
@pytest.mark.parametrize("sequence", [False, True])
def test_block_scales_do_not_depend_on_the_layout(pairs: dict, name: str, sequence: bool) -> None:
    """Where shards are whole blocks. A sum of another order can turn one rounding of the layer behind it: below the
    size of what FP8 itself changes."""
    alone, split = pairs[name][0], pairs[name][1 + sequence]
    apart = differences(split, alone)
    assert max(apart["output"], apart["input"], apart["fc1"], apart["fc2"]) < 1e-3, apart


def test_one_scale_for_a_tensor_is_one_for_a_rank(pairs: dict) -> None:
    """Weights, inputs of row-parallel and gradients of column-parallel layers: of the rank's own values, in Transformer
    Engine too. So results of TP 2 are not those of one rank, but as near as FP8 is."""
    apart = differences(pairs["tensorwise"][1], pairs["tensorwise"][0])
    assert all(1e-3 < value < 0.1 for value in apart.values()), apart


@EVERY_RECIPE
def test_sequence_parallelism_changes_nothing(pairs: dict, name: str) -> None:
    """What is gathered over the sequence has the scales of the gathered tensor."""
    _, split, sequence = pairs[name]
    assert max(differences(sequence, split).values()) < 1e-6


def _kinds(path: Path, model: dict[str, Any], layout: dict[str, Any]) -> dict[str, str]:
    with joined(**layout) as context:
        modules = build_policy(path, context, model=model).model.named_modules()
        return {
            name: type(module).__name__
            for name, module in modules
            if isinstance(module, ColumnParallelLinear | RowParallelLinear)
        }


@pytest.mark.parametrize(("checkpoint", "linears"), [("qwen2", 4), ("qwen3_moe", 2 + 4 * 2)])
def test_every_product_of_the_layers_and_nothing_else(checkpoints: dict, checkpoint: str, linears: int) -> None:
    """The head stays as it is, as under Transformer Engine, whose spec has no module for it."""
    kinds = run_ranks(1, _kinds, checkpoints[checkpoint], emulation("mxfp8"), {})[0]
    layers = {name: kind for name, kind in kinds.items() if ".layers." in name}
    assert len(layers) == 4 * linears
    assert set(layers.values()) == {kind.__name__ for kind in EMULATED}
    assert {name: kind for name, kind in kinds.items() if name not in layers} == {
        "output_layer": "ColumnParallelLinear"
    }


@pytest.mark.parametrize("layout", [{"pipeline": 2}, {"pipeline": 2, "virtual_stages": 2}], ids=["pp2", "vpp2"])
def test_first_and_last_layers_without_fp8(checkpoints: dict, layout: dict[str, Any]) -> None:
    """Of the model, not of a stage or of a chunk of layers."""
    options = emulation("blockwise", first_last_layers_bf16=(1, 1))
    ranks = run_ranks(2, _kinds, checkpoints["qwen2"], options, layout)
    emulated = [sum(kind.startswith("Emulated") for kind in kinds.values()) for kinds in ranks]
    assert emulated == [4, 4]  # four layers of four products; one of two layers on each rank


def _gradients(path: Path, modes: list[dict[str, Any]], layout: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    found = []
    with joined(**layout) as context:
        for mode in modes:
            policy = build_policy(path, context, budget=1000, model=mode)
            policy.accumulate_gradients(share(policy, make_examples()), SPEC)
            found.append({n: p.main_grad.numpy().copy() for n, p in policy.model.named_parameters()})
    return found


@EVERY_RECIPE
def test_recompute_rounds_the_same_way(checkpoints: dict, name: str) -> None:
    modes = [{}, {"recompute": "full"}, {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}]
    options = [emulation(name, **mode) for mode in modes]
    for layout in ({}, {"tensor": 2, "sequence": True}):
        for rank in run_ranks(layout.get("tensor", 1), _gradients, checkpoints["qwen2"], options, layout):
            for mode in rank[1:]:
                for parameter, expected in rank[0].items():
                    np.testing.assert_array_equal(mode[parameter], expected, err_msg=parameter)


def _likelihood_gradients(path: Path, options: list[dict[str, Any]]) -> list[np.ndarray]:
    """Of the plain log-likelihood: ratios and clips would turn small differences into large ones."""
    spec, found = LossSpec(SurrogateConfig(), None, temperature=1.0), []
    with joined() as context:
        for model in options:
            policy = build_policy(path, context, budget=1000, model=model)
            policy.accumulate_gradients([_plain(example) for example in make_examples()], spec)
            found.append(np.concatenate([p.main_grad.double().numpy().ravel() for p in policy.model.parameters()]))
    return found


def _plain(example: Example) -> Example:
    ones = np.ones(len(example.response_ids), np.float32)
    return Example(example.prompt_ids, example.response_ids, ones, ones, float(len(ones)))


def test_gradients_of_a_model_are_near_those_without_fp8(checkpoints: dict) -> None:
    """Near, and not equal: every recipe rounds, forward and backward."""
    options = [{}, *(emulation(name) for name in RECIPES)]
    plain, *rounded = run_ranks(1, _likelihood_gradients, checkpoints["qwen2"], options)[0]
    for name, gradient in zip(RECIPES, rounded, strict=True):
        cosine = gradient @ plain / np.linalg.norm(gradient) / np.linalg.norm(plain)
        assert 0.9 < cosine < 0.9999, (name, cosine)


def _experts(path: Path, layout: dict[str, Any]) -> dict[str, float]:
    with joined(**layout) as context:
        policy = build_policy(path, context, optimizer=OPTIMIZER, model=emulation("blockwise"))
        before = weights_of(policy)
        metrics = policy.update(share(policy, make_examples()), SPEC)
        after = weights_of(policy)
        moved = [float(np.abs(after[name] - before[name]).max()) for name in after if ".experts." in name]
        return {"norm": metrics["train/grad_norm"], "least moved": min(moved)}


@pytest.mark.parametrize("layout", [{}, {"expert": 2}], ids=["one rank", "ep2"])
def test_experts_learn(checkpoints: dict, layout: dict[str, Any]) -> None:
    for found in run_ranks(layout.get("expert", 1), _experts, checkpoints["qwen3_moe"], layout):
        assert np.isfinite(found["norm"]) and found["least moved"] > 0


def _scores(path: Path, options: list[dict[str, Any]]) -> list[np.ndarray]:
    with joined() as context:
        return [_logprobs(path, context, model) for model in options]


def _logprobs(path: Path, context: ParallelContext, model: dict[str, Any]) -> np.ndarray:
    scores = build_policy(path, context, model=model).score(make_scorings())
    return np.concatenate([score.logprobs_T for score in scores.values()])


def test_fewer_rounded_layers_change_less(checkpoints: dict) -> None:
    options = [{}, emulation("tensorwise"), emulation("tensorwise", first_last_layers_bf16=(2, 1)), {}]
    plain, all_layers, one_layer, again = run_ranks(1, _scores, checkpoints["qwen2"], options)[0]
    assert 0 < np.abs(one_layer - plain).mean() < np.abs(all_layers - plain).mean()
    np.testing.assert_array_equal(again, plain)


def _names(path: Path, options: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with joined() as context:
        return [_sharded(path, context, model) for model in options]


def _sharded(path: Path, context: ParallelContext, model: dict[str, Any]) -> dict[str, Any]:
    state: Callable[..., dict[str, Any]] = build_policy(path, context, model=model).model.sharded_state_dict
    with context.megatron_calls():
        return {name: getattr(value, "global_shape", None) for name, value in state().items()}


def test_checkpoints_have_the_same_names(checkpoints: dict) -> None:
    """Emulation can be turned on and off at a resume."""
    plain, emulated = run_ranks(1, _names, checkpoints["qwen2"], [{}, emulation("blockwise")])[0]
    assert plain == emulated
