"""Weights of models with experts: to any layout and back, through every kind of file, and against `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_helper import run_ranks
from safetensors.torch import load_file
from tiny_checkpoints import MOE_CASES, build, layout, make_checkpoint
from torch import nn

from megatron_hdpo.checkpoint.store import CheckpointStore
from megatron_hdpo.model.build import wrap_data_parallel
from megatron_hdpo.model.config import OptimizerConfig
from megatron_hdpo.model.optimizer import build_optimizer
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.convert import convert, inspect, open_model
from megatron_hdpo.weights.errors import WeightsError
from megatron_hdpo.weights.load import load_hf
from megatron_hdpo.weights.logprobs import packed_logprobs
from megatron_hdpo.weights.save import save_hf
from megatron_hdpo.weights.stream import stream_hf

Layout = dict[str, Any]

SEQUENCE: Layout = {"tensor": 2, "sequence": True}
CHUNKS: Layout = {"pipeline": 2, "virtual_stages": 2}
TWO_RANKS: list[Layout] = [
    {"expert": 2},
    {"expert_tensor": 2},
    SEQUENCE | {"expert": 2},
    SEQUENCE | {"expert_tensor": 2},
    {"context": 2, "expert": 2},
]
FOUR_RANKS: list[Layout] = [
    CHUNKS | {"expert": 2},
    SEQUENCE | {"expert": 2},
    SEQUENCE | {"expert": 2, "expert_tensor": 2},
    {"expert": 4},
    SEQUENCE | {"context": 2, "expert": 2},
]


def _sequences() -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    return [generator.integers(0, 499, length) for length in (1, 37, 60)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each case, with the log-probs of `transformers` beside the weights."""
    folder = tmp_path_factory.mktemp("experts")
    for case in MOE_CASES:
        model = make_checkpoint(case, folder / case)
        with torch.no_grad():
            logits = [model(torch.from_numpy(ids)[None]).logits[0] for ids in _sequences()]
        torch.save([torch.log_softmax(values, dim=-1) for values in logits], folder / case / "logprobs.pt")
    return {case: folder / case for case in MOE_CASES}


def _receives(context: ParallelContext, to: str) -> bool:
    return {"all": True, "leader": context.is_replica_leader, "first": context.is_leader}[to]


def _check_streams(model: nn.Module, architecture: Any, context: ParallelContext, path: Path) -> None:
    expected = load_file(path / "model.safetensors")
    for to, bucket_bytes in (("all", 20_000), ("leader", 3_000), ("first", 2**26)):
        received = list(stream_hf(model, architecture, context, to=to, bucket_bytes=bucket_bytes))
        assert len(received) == (len(expected) if _receives(context, to) else 0)
        assert all(torch.equal(value, expected[name]) for name, value in received)
        assert {name for name, _ in received} == (expected.keys() if received else set())


def _round_trips(checkpoints: dict[str, Path], layouts: list[Layout]) -> None:
    """Run one case per layout: load, stream to every kind of receiver, and run the model."""
    for index, sizes in enumerate(layouts):
        path = list(checkpoints.values())[index % 2]
        with layout(**{"tensor": 1, "pipeline": 1} | sizes) as context:
            model, architecture = build(path, context)
            wrapped = wrap_data_parallel(model, context) if index % 3 == 0 else model
            load_hf(wrapped, architecture, context, path)
            _check_streams(wrapped, architecture, context, path)
            found = packed_logprobs(wrapped, architecture, context, _sequences())
            assert len(found) == (len(_sequences()) if context.is_replica_leader else 0)
            for ours, theirs in zip(found, torch.load(path / "logprobs.pt") if found else [], strict=True):
                assert ours.std() > 0.5, "logits this flat would agree by luck"
                torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-5)


def test_two_ranks(checkpoints: dict[str, Path]) -> None:
    run_ranks(2, _round_trips, checkpoints, TWO_RANKS)


def test_four_ranks(checkpoints: dict[str, Path]) -> None:
    run_ranks(4, _round_trips, checkpoints, FOUR_RANKS)


def _saves(source: Path, out: Path) -> None:
    """Hugging Face shards, and Megatron's own checkpoint from one layout to another and to a third."""
    _training_checkpoint(source, out)
    with layout(1, 1, expert=2) as context:
        model, architecture = build(source, context)
        load_hf(model, architecture, context, source)
        save_hf(model, architecture, context, source, out / "shards", max_shard_bytes=200_000)
        load_hf(model, architecture, context, out / "shards")
        _check_streams(model, architecture, context, source)
        convert(source, out / "megatron", "megatron", context)
    with layout(1, 2, virtual_stages=2) as context:
        convert(out / "megatron", out / "again", "megatron", context)
    with layout(2, 1, sequence=True, expert_tensor=2) as context:
        convert(out / "again", out / "back", "huggingface", context)


def _training_checkpoint(source: Path, out: Path) -> None:
    """Save a run's checkpoint after an optimizer step; experts have an optimizer of their own."""
    with layout(1, 1, expert=2) as context:
        model, architecture = build(source, context)
        ddp = wrap_data_parallel(model, context)
        load_hf(ddp, architecture, context, source)
        optimizer, schedule = build_optimizer(OptimizerConfig(lr=1e-3), ddp, context, total_steps=1)
        with context.megatron_calls():
            for parameter in model.parameters():
                parameter.main_grad.fill_(0.1)
            optimizer.step()
        path = CheckpointStore(out / "run", context, keep=1).save(
            1, Policy(architecture, context, ddp, 256, optimizer=optimizer, schedule=schedule)
        )
        trained = dict(stream_hf(ddp, architecture, context))
    with layout(1, 2, virtual_stages=2) as context:
        found = dict(stream_hf(open_model(inspect(path, source), context), architecture, context))
    first = load_file(source / "model.safetensors")
    assert found.keys() == trained.keys() == first.keys()
    assert all(torch.equal(found[name], trained[name]) for name in first)
    assert not any(torch.equal(trained[name], first[name]) for name in first)


def test_files(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = checkpoints["qwen3_moe_tied_raw"]
    run_ranks(2, _saves, source, tmp_path)
    expected, found = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _use_engine_names(model: Any) -> None:
    """Have the parameters where Transformer Engine's layers have them: one module for all experts of a rank."""
    for layer in model.decoder.layers:
        layer.self_attention.linear_qkv.layer_norm_weight = layer.input_layernorm.weight
        layer.input_layernorm = nn.Identity()
        grouped = nn.ModuleDict({"linear_fc1": nn.Module(), "linear_fc2": nn.Module()})
        for number, expert in enumerate(layer.mlp.experts.local_experts):
            for name in grouped:
                setattr(grouped[name], f"weight{number}", getattr(expert, name).weight)
        layer.mlp.experts = grouped


def _engine_round_trip(path: Path) -> None:
    with layout(1, 1, expert=2) as context:
        model, architecture = build(path, context)
        _use_engine_names(model)
        names = dict(model.named_parameters())
        assert "decoder.layers.3.mlp.experts.linear_fc2.weight1" in names
        assert not any("local_experts" in name for name in names)
        load_hf(model, architecture, context, path)
        _check_streams(model, architecture, context, path)


def test_names_of_the_transformer_engine_spec(checkpoints: dict[str, Path]) -> None:
    run_ranks(2, _engine_round_trip, checkpoints["qwen3_moe"])


def _drifted(path: Path) -> None:
    with layout(2, 1, sequence=True, expert=2) as context:
        model, architecture = build(path, context)
        load_hf(model, architecture, context, path)
        with torch.no_grad():
            model.decoder.layers[1].mlp.router.weight[0] += context.groups.tp.rank()
        with pytest.raises(WeightsError, match=r"model\.layers\.1\.mlp\.gate\.weight differs between"):
            list(stream_hf(model, architecture, context))


def test_a_router_that_drifted_apart_is_an_error(checkpoints: dict[str, Path]) -> None:
    run_ranks(2, _drifted, checkpoints["qwen3_moe"])
