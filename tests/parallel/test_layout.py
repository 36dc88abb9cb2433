"""Layouts that are refused, and the texts of the errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from megatron_hdpo.parallel.context import start
from megatron_hdpo.parallel.layout import LayoutError, ModelSizes, ParallelConfig, check_layout

MODEL = {"num_layers": 6, "num_heads": 12, "num_kv_heads": 3, "ffn_size": 90}
EXPERTS = {"ffn_size": 91, "num_experts": 8, "expert_ffn_size": 6}


def _check(world_size: int, model: dict[str, Any] | None = None, **layout: Any) -> None:
    check_layout(ParallelConfig(**layout), ModelSizes(**{**MODEL, **(model or {})}), world_size)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        (5, {}),
        (3, {"tensor": 3}),
        (6, {"tensor": 3, "sequence": True}),
        (12, {"tensor": 3, "pipeline": 2}),
        (6, {"pipeline": 6}),
        (2, {"pipeline": 2, "virtual_stages": 3}),
        (6, {"tensor": 3, "context": 2, "sequence": True}),
    ],
)
def test_layouts_that_fit(world_size: int, layout: dict[str, Any]) -> None:
    _check(world_size, **layout)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (8, {"expert": 8}),
        (6, {"tensor": 3, "sequence": True, "expert": 2, "expert_tensor": 3}),
        (4, {"pipeline": 2, "virtual_stages": 3, "expert": 2}),
    ],
)
def test_layouts_that_fit_experts(world_size: int, layout: dict[str, Any]) -> None:
    """Whatever the channels of a dense layer, of which there is none."""
    _check(world_size, EXPERTS, **layout)


@pytest.mark.parametrize(
    ("world_size", "layout", "model", "text"),
    [
        (4, {"tensor": 3}, {}, r"^4 ranks are no multiple of .* = 3 x 1 x 1: start a multiple of 3$"),
        (
            4,
            {"pipeline": 3},
            {},
            r"^4 ranks are no multiple of .* = 1 x 1 x 3: start a multiple of 3$",
        ),
        (3, {"tensor": 3}, {"num_heads": 10}, r"^parallel.tensor=3 does not divide the model's 10 attention heads$"),
        (2, {"tensor": 2}, {}, r"^parallel.tensor=2 does not divide the model's 3 key-value heads$"),
        (3, {"tensor": 3}, {"ffn_size": 91}, r"^parallel.tensor=3 does not divide the model's 91 FFN channels$"),
        (4, {"pipeline": 4}, {}, r"^parallel.pipeline=4 does not divide the model's 6 layers$"),
        (1, {"sequence": True}, {}, r"^parallel.sequence=true needs parallel.tensor > 1$"),
        (4, {"context": 3}, {}, r"^4 ranks are no multiple of .* = 1 x 3 x 1: start a multiple of 3$"),
        (1, {"virtual_stages": 2}, {}, r"^parallel.virtual_stages=2 needs parallel.pipeline > 1$"),
        (
            2,
            {"pipeline": 2, "virtual_stages": 2},
            {},
            r"^parallel.pipeline x .*=4 does not divide the model's 6 layers$",
        ),
        (2, {"expert": 2}, {}, r"^parallel.expert and parallel.expert_tensor are for models with experts"),
        (3, {"expert": 2}, EXPERTS, r"^3 ranks are no multiple of .* = 1 x 2 x 1$"),
        (3, {"expert": 3}, EXPERTS, r"^parallel.expert=3 does not divide the model's 8 experts$"),
        (4, {"expert_tensor": 4}, EXPERTS, r"^parallel.expert_tensor=4 does not divide 6 expert channels$"),
        (3, {"tensor": 3}, EXPERTS, r"^a model with experts and parallel.tensor > 1 needs parallel.sequence=true$"),
    ],
)
def test_layouts_that_do_not(world_size: int, layout: dict[str, Any], model: dict[str, Any], text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        _check(world_size, model, **layout)


def test_every_reason_is_given_at_once() -> None:
    with pytest.raises(LayoutError) as error:
        _check(3, tensor=4, pipeline=4)
    assert str(error.value).count(";") == 3
    for part in ("3 ranks", "3 key-value heads", "90 FFN channels", "6 layers"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [({}, 1), ({"tensor": 2, "context": 2}, 4), ({"pipeline": 2, "expert": 2}, 4), ({"tensor": 3, "expert": 2}, 6)],
)
def test_the_fewest_ranks_of_a_layout(layout: dict[str, int], ranks: int) -> None:
    assert ParallelConfig(**layout).least_ranks == ranks


@pytest.mark.parametrize("wrong", [{"tensor": 0}, {"pipeline": -1}, {"timeout_minutes": 0}, {"contexts": 2}])
def test_sizes_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ParallelConfig(**wrong)


def test_a_wrong_number_of_ranks_is_said_before_any_group_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(LayoutError, match=r"3 ranks are no multiple .* = 2 x 1 x 1: start a multiple of 2"):
        start(ParallelConfig(tensor=2), device="cpu")
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(LayoutError, match="device=cuda, but torch sees no GPU on this machine: set device=cpu"):
        start(ParallelConfig(), device="cuda")
    assert not dist.is_initialized()
