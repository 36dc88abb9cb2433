"""An expert layer's router finds the name that Megatron-Core defines with Transformer Engine only, on a GPU too."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.parallel.router_name import router_name_defined

NAME = "te_general_gemm"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_router_runs_on_every_device(device: str) -> None:
    """The product itself runs on the CPU; what depends on the device is what `megatron_calls` enters."""
    x, weight = (torch.randn(shape, requires_grad=True) for shape in ((5, 4), (3, 4)))
    with ParallelContext.megatron_calls(SimpleNamespace(device=torch.device(device))):  # type: ignore[arg-type]
        logits = moe_utils.router_gating_linear(x, weight, None, torch.float32)
        gradient = torch.autograd.grad(logits.sum(), weight)[0]
    assert torch.equal(logits, x @ weight.t())
    assert torch.allclose(gradient, x.sum(0).expand(3, 4))


def test_the_name_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(moe_utils, NAME, raising=False)
    with router_name_defined():
        with router_name_defined():
            assert moe_utils.te_general_gemm is None
        assert moe_utils.te_general_gemm is None
    assert not hasattr(moe_utils, NAME)
    with pytest.raises(RuntimeError, match="on purpose"), router_name_defined():
        raise RuntimeError("on purpose")
    assert not hasattr(moe_utils, NAME)


def test_transformer_engines_function_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = object()
    monkeypatch.setattr(moe_utils, NAME, engine, raising=False)
    with router_name_defined():
        assert moe_utils.te_general_gemm is engine
    assert moe_utils.te_general_gemm is engine
