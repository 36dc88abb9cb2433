"""Rotary tables against `transformers`: equal up to the model's whole context, and wrong ones are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_helper import run_ranks
from tiny_checkpoints import CASES, LLAMA3, LONG, SIZES, build, layout, make_checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import megatron_hdpo.weights.verify as verify_module
from megatron_hdpo.weights.checks import Check
from megatron_hdpo.weights.convert import open_model
from megatron_hdpo.weights.rope_check import _rotary_of_transformers, table_difference
from megatron_hdpo.weights.verify import verify

CONTEXT = 131_072
SCALED: dict[str, Any] = {"max_position_embeddings": CONTEXT, "head_dim": 32, "num_hidden_layers": 1}
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "long": {"rope_type": "default", "rope_theta": 5_000_000.0},
    "llama3": LLAMA3 | {"rope_theta": 500_000.0},
}
CONTEXTS = {"default": 4097, "long": 32_768, "llama3": CONTEXT}


class Table:
    """Megatron's part of a table: angles of a block of positions."""

    def __init__(self, inv_freq_D: torch.Tensor, ends_at: int | None = None) -> None:
        self.inv_freq_D, self.ends_at = inv_freq_D, ends_at

    def get_freqs_non_repeated(self, count: int, offset: int) -> torch.Tensor:
        positions = torch.arange(offset, offset + count, dtype=torch.float32)
        return torch.outer(positions if self.ends_at is None else positions.clamp(max=self.ends_at), self.inv_freq_D)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("rope")
    with pytest.MonkeyPatch.context() as patch:
        for name, rope in ROPE.items():
            config = LlamaConfig(**SIZES | SCALED, rope_parameters=rope)
            patch.setitem(CASES, name, lambda config=config: config)
            make_checkpoint(name, root / name)
    return {name: root / name for name in ROPE}


def _tables(folders: dict[str, Path]) -> dict[str, Any]:
    with layout(1, 1) as context:
        return {name: build(path, context)[0].rotary_pos_emb.inv_freq for name, path in folders.items()}


def test_tables_equal_those_of_transformers_up_to_the_whole_context(folders: dict[str, Path]) -> None:
    tables = run_ranks(1, _tables, folders)[0]
    for name, inv_freq_D in tables.items():
        theirs = _rotary_of_transformers(folders[name])
        largest, first = table_difference(Table(inv_freq_D), theirs, CONTEXTS[name])
        assert first is None and largest < 0.05, (name, largest, first)
        # The same in float64, by the definition: both are right, and not only equal.
        exact = np.outer(np.arange(0, CONTEXT, 997), theirs.inv_freq.numpy().astype(np.float64))
        cos = theirs(torch.empty(0), torch.arange(0, CONTEXT, 997)[None])[0][0, :, : exact.shape[1]].numpy()
        assert np.abs(np.cos(exact) - cos).max() < 0.01


def with_factor(factor: float, base: float = 500_000.0) -> LlamaRotaryEmbedding:
    config = LlamaConfig(**SIZES | SCALED, rope_parameters=LLAMA3 | {"rope_theta": base, "factor": factor})
    return LlamaRotaryEmbedding(config=config)


@pytest.mark.parametrize(
    ("table", "hidden_until"),
    [
        (Table(with_factor(4.0).inv_freq), 1),
        (Table(with_factor(8.0, base=500_100.0).inv_freq), 1),
        (Table(with_factor(8.0).inv_freq, ends_at=4095), 4096),
        (Table(with_factor(8.0).inv_freq, ends_at=10_000), 10_001),
        (Table(with_factor(8.0).inv_freq * torch.tensor([*[1.0] * 15, float("nan")])), 0),
    ],
)
def test_a_wrong_table_is_found(table: Table, hidden_until: int) -> None:
    theirs = with_factor(8.0)
    assert table_difference(Table(theirs.inv_freq), theirs, 12_000)[1] is None
    assert table_difference(table, theirs, hidden_until)[1] is None
    largest, first = table_difference(table, theirs, 12_000)
    assert first is not None and first.startswith("position ") and largest > 1e-3
    if hidden_until > 1:
        assert first.startswith(f"position {hidden_until},")


def test_an_attention_scaling_is_part_of_the_table() -> None:
    theirs = with_factor(8.0)
    theirs.attention_scaling = 1.1
    assert "position 0, channel 0: cosine 1.000000, of transformers 1.100000" in str(
        table_difference(Table(theirs.inv_freq), theirs, 10)[1]
    )


def _verified(path: Path, broken: bool) -> list[Check]:
    def opened(*args: Any) -> Any:
        model = open_model(*args)
        if broken:
            model.rotary_pos_emb.inv_freq[-8:] /= 2
        return model

    with layout(1, 1) as context, pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_module, "open_model", opened)
        return verify(path, None, context)


def test_a_wrong_factor_fails_the_verification(tmp_path: Path) -> None:
    """A wrong factor of the slowest frequencies."""
    with pytest.MonkeyPatch.context() as patch:
        config = LlamaConfig(**SIZES | LONG | {"head_dim": 32, "num_hidden_layers": 1}, rope_parameters=ROPE["llama3"])
        patch.setitem(CASES, "broken", lambda: config)
        make_checkpoint("broken", tmp_path / "model")
    good, broken = (run_ranks(1, _verified, tmp_path / "model", bad, fresh=bad)[0] for bad in (False, True))
    assert all(check.passed for check in good) and "rotary positions" in good[-2].name, good
    assert "16,384 positions x 32 channels" in good[-2].summary and "texts of up to 4,096 tokens" in good[-1].summary
    assert [check.passed for check in broken[:2]] == [True, True]
    assert not broken[2].passed and "first difference beyond rounding is at position" in broken[2].details[0]
