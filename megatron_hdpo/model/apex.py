"""Detect which package named apex is installed, without importing it.

NVIDIA's Apex comes from its repository or a container; the package apex on PyPI is an unrelated project of 2013.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

Apex = Literal["absent", "other project", "without kernels", "without fused gradients", "whole"]


def installed_apex() -> Apex:
    """Return which apex is installed and which of its kernels are there.

    NVIDIA's Apex is recognised by its folder of multi-tensor functions; its kernels by its compiled modules: amp_C
    (norms and copies of many tensors at once) and fused_weight_gradient_mlp_cuda (weight gradients added to their
    accumulator).
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "absent"
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return "other project"
    if importlib.util.find_spec("amp_C") is None:
        return "without kernels"
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        return "without fused gradients"
    return "whole"
