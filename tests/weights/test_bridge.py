"""The optional adapter: a clear error without Megatron-Bridge, and the calls that it makes with one."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from megatron_hdpo.weights.bridge import MegatronBridge
from megatron_hdpo.weights.errors import WeightsError


def test_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)
    with pytest.raises(WeightsError, match="needs Megatron-Bridge, which cannot be imported"):
        MegatronBridge("anywhere")


def _with_bridge(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = types.ModuleType("megatron.bridge")
    module.AutoBridge = MagicMock()
    monkeypatch.setitem(sys.modules, "megatron.bridge", module)
    return module.AutoBridge


def test_unknown_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_bridge(monkeypatch).from_hf_pretrained.side_effect = ValueError("no such model")
    with pytest.raises(WeightsError, match="cannot convert folder: no such model"):
        MegatronBridge("folder")


def test_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inner = _with_bridge(monkeypatch).from_hf_pretrained.return_value
    bare, wrapper = torch.nn.Linear(2, 2), torch.nn.Module()
    wrapper.module = bare
    provider = inner.to_megatron_provider.return_value
    provider.provide_distributed_model.return_value = [wrapper]
    inner.export_hf_weights.return_value = [("a", torch.ones(1))]
    bridge = MegatronBridge(tmp_path)
    context: Any = SimpleNamespace(layout=SimpleNamespace(tensor=4, pipeline=2, sequence=True))
    assert bridge.build(context) is bare
    assert (provider.tensor_model_parallel_size, provider.pipeline_model_parallel_size) == (4, 2)
    assert provider.params_dtype == torch.bfloat16
    bridge.load(wrapper)
    inner.load_hf_weights.assert_called_once_with([bare], str(tmp_path))
    assert [name for name, _ in bridge.stream(wrapper)] == ["a"]
