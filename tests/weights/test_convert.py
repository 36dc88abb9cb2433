"""Conversion in both directions and between layouts, and the proof of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_helper import run_ranks
from megatron.core.transformer.identity_op import IdentityOp
from safetensors.torch import load_file, save_file
from tiny_checkpoints import build, layout, make_checkpoint

from megatron_hdpo.checkpoint.store import CheckpointStore
from megatron_hdpo.model.build import wrap_data_parallel
from megatron_hdpo.model.config import OptimizerConfig
from megatron_hdpo.model.optimizer import build_optimizer
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.checks import Check
from megatron_hdpo.weights.convert import convert, inspect, open_model
from megatron_hdpo.weights.errors import WeightsError
from megatron_hdpo.weights.load import load_hf
from megatron_hdpo.weights.megatron_files import load_megatron
from megatron_hdpo.weights.stream import stream_hf
from megatron_hdpo.weights.verify import verify

CASES = ("qwen2_tied", "qwen3")
CHANGED = "model.layers.2.self_attn.k_proj.weight"


def _world(folder: Path) -> dict[str, list[Check]]:
    """All that saves Megatron checkpoints, in one world: the first save of a process takes seconds."""
    _conversions(folder)
    _training_checkpoint(folder / "qwen3")
    return _proofs(folder / "proof")


def _conversions(folder: Path) -> None:
    """Convert each case Hugging Face -> Megatron -> Megatron -> Hugging Face, every step at another layout."""
    steps = [((2, 1), "hf", "a", "megatron"), ((1, 2), "a", "b", "megatron"), ((1, 1), "b", "back", "huggingface")]
    for (tensor, pipeline), source, out, to in steps:
        with layout(tensor, pipeline) as context:
            for case in CASES:
                convert(folder / case / source, folder / case / out, to, context)
    one, other = (folder / case for case in CASES)
    with layout(1, 1) as context:
        checkpoint = inspect(one / "b")
        model = open_model(checkpoint, context)
        padding = model.embedding.word_embeddings.weight[checkpoint.architecture.vocab_size :]
        assert len(padding) == 13 and not padding.any()
        convert(one / "hf", one / "half", "megatron", context, dtype="bfloat16")
        assert next(open_model(inspect(one / "half"), context).parameters()).dtype == torch.bfloat16
        with pytest.raises(WeightsError, match="exists: remove it"):
            convert(one / "hf", one / "half", "megatron", context)
        _wrong_shape(one, other, context)


def _wrong_shape(one: Path, other: Path, context: ParallelContext) -> None:
    """A Megatron checkpoint of another model: every key is named, on every rank."""
    model, architecture = build(one / "hf", context)
    with pytest.raises(WeightsError) as error:
        load_megatron(model, architecture, context, other / "b")
    assert "missing" in str(error.value) and "decoder.layers.self_attention.linear_qkv.bias" in str(error.value)
    assert "unexpected" in str(error.value) and "decoder.layers.self_attention.q_layernorm.weight" in str(error.value)
    assert "of a wrong shape" in str(error.value) and "(4, 192, 64), expected (4, 96, 64)" in str(error.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face checkpoints to convert, and wrong copies of one of them."""
    folder = tmp_path_factory.mktemp("convert")
    for case in CASES:
        make_checkpoint(case, folder / case / "hf")
    make_checkpoint("llama", folder / "proof" / "good")
    state = load_file(folder / "proof" / "good" / "model.safetensors")
    for name, change in (("bad", state[CHANGED] * (1 + 1e-6)), ("less", None)):
        (folder / "proof" / name).mkdir()
        kept = {key: value for key, value in (state | {CHANGED: change}).items() if value is not None}
        save_file(kept, folder / "proof" / name / "model.safetensors")
        config = (folder / "proof" / "good" / "config.json").read_text()
        (folder / "proof" / name / "config.json").write_text(config)
    return folder


@pytest.fixture(scope="module")
def proofs(folder: Path) -> list[dict[str, list[Check]]]:
    """Everything is converted once; the proofs, of each rank."""
    return run_ranks(2, _world, folder)


@pytest.mark.parametrize("case", CASES)
def test_conversion_between_layouts(case: str, folder: Path, proofs: object) -> None:
    first, back = (load_file(folder / case / name / "model.safetensors") for name in ("hf", "back"))
    assert first.keys() == back.keys()
    assert all(torch.equal(first[name], back[name]) for name in first)
    assert not list((folder / case).glob(".*")), "temporary folders are gone"


def _streams(path: Path) -> dict[str, torch.Tensor]:
    with layout(2, 2) as context:
        checkpoint = inspect(path)
        return dict(stream_hf(open_model(checkpoint, context), checkpoint.architecture, context))


def test_both_dimensions_at_once(folder: Path, proofs: object) -> None:
    expected = load_file(folder / "qwen2_tied" / "hf" / "model.safetensors")
    for streamed in run_ranks(4, _streams, folder / "qwen2_tied" / "b"):
        assert streamed.keys() == expected.keys()
        assert all(torch.equal(streamed[name], expected[name]) for name in expected)


def _use_engine_names(model: torch.nn.Module) -> None:
    """Move the norms to where the Transformer Engine spec has them."""
    for layer in model.decoder.layers:
        layer.self_attention.linear_qkv.layer_norm_weight = layer.input_layernorm.weight
        layer.mlp.linear_fc1.layer_norm_weight = layer.pre_mlp_layernorm.weight
        layer.input_layernorm, layer.pre_mlp_layernorm = IdentityOp(), IdentityOp()


def _engine_round_trip(path: Path) -> None:
    with layout(1, 1) as context:
        model, architecture = build(path, context)
        _use_engine_names(model)
        load_hf(model, architecture, context, path)
        names = dict(model.named_parameters())
        assert "decoder.layers.3.mlp.linear_fc1.layer_norm_weight" in names
        assert not any(".input_layernorm." in name for name in names)
        expected = load_file(path / "model.safetensors")
        streamed = dict(stream_hf(model, architecture, context))
        assert streamed.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in streamed.items())


def test_names_of_the_transformer_engine_spec(tmp_path: Path) -> None:
    make_checkpoint("qwen3", tmp_path / "qwen3")
    run_ranks(1, _engine_round_trip, tmp_path / "qwen3")


def _training_checkpoint(folder: Path) -> None:
    """Save a run's checkpoint after two optimizer steps: the weights for any layout, and the optimizer's state."""
    with layout(2, 1) as context:
        model, architecture = build(folder / "hf", context)
        ddp = wrap_data_parallel(model, context)
        load_hf(ddp, architecture, context, folder / "hf")
        optimizer, schedule = build_optimizer(OptimizerConfig(lr=1e-3), ddp, context, total_steps=2)
        with context.megatron_calls():
            for _ in range(2):
                for parameter in model.parameters():
                    parameter.main_grad.fill_(0.1)
                optimizer.step()
        store = CheckpointStore(folder / "run", context, keep=1)
        path = store.save(2, Policy(architecture, context, ddp, 256, optimizer=optimizer, schedule=schedule))
        trained = dict(stream_hf(ddp, architecture, context))
    with layout(1, 2) as context:
        with pytest.raises(WeightsError, match="--config"):
            inspect(path)
        found = dict(stream_hf(open_model(inspect(path, folder / "hf"), context), architecture, context))
    first = load_file(folder / "hf" / "model.safetensors")
    assert found.keys() == trained.keys() == first.keys()
    assert all(torch.equal(found[name], trained[name]) for name in first)
    assert not any(torch.equal(trained[name], first[name]) for name in first)


def _proofs(folder: Path) -> dict[str, list[Check]]:
    with layout(1, 2) as context:
        convert(folder / "good", folder / "megatron", "megatron", context)
        pairs = [("good", None), ("good", "megatron"), ("megatron", None), ("good", "bad"), ("good", "less")]
        return {
            f"{a} {b}": verify(folder / a, None if b is None else folder / b, context, scratch=folder) for a, b in pairs
        }


def test_proof_of_a_conversion(proofs: list[dict[str, list[Check]]]) -> None:
    checks, of_rank_one = proofs
    assert checks == of_rank_one, "all ranks know the outcome"
    for key in ("good None", "good megatron", "megatron None"):
        assert all(check.passed for check in checks[key]), checks[key]
        assert "log-probs" in checks[key][-1].name
    assert "bit-equal" in checks["good bad"][-1].summary and CHANGED in checks["good bad"][-1].details[1]
    assert not checks["good less"][-1].passed and CHANGED in checks["good less"][-1].details[0]
