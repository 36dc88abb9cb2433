"""Transformer Engine's Python modules on a machine without a GPU: its own code on a stand-in for its extension.

    python te_python.py MODULE ARGUMENTS...    calls MODULE.main() where Megatron-Core finds Transformer Engine

`make te-python` unpacks the Python half, which is under a megabyte; the stand-in takes the place of the compiled half,
which wants cuDNN and a driver. Layers can be built, loaded and saved; nothing can be computed.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import torch

_CACHE = Path(__file__).parents[2] / ".cache"
# Of the version that the Makefile names.
FOLDER = max(_CACHE.glob("transformer-engine-*"), default=_CACHE / "transformer-engine")
# The second and third are needed for exports to ONNX only.
_REPLACED = ("transformer_engine_torch", "onnx", "onnxscript")


def use_te_python() -> None:
    """Let this process import Transformer Engine; to be called before anything imports Megatron-Core."""
    assert "megatron.core" not in sys.modules, "Megatron-Core has looked for Transformer Engine already"
    sys.path.insert(0, str(FOLDER))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # do not load CUDA's libraries
    for name in _REPLACED:
        stand_in = MagicMock(name=name)
        stand_in.__spec__, stand_in.__all__ = ModuleSpec(name, None), ["get_cudnn_version"]
        stand_in.get_cudnn_version.return_value = 92000
        sys.modules[name] = stand_in
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    importlib.import_module("transformer_engine.pytorch")
    torch.cuda.is_available = lambda: True  # its layers ask, and go where they are told to then


if __name__ == "__main__":
    use_te_python()
    sys.argv = sys.argv[1:]
    importlib.import_module(sys.argv[0]).main()
