"""What this machine has, and which installed packages will not do what their names promise."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator

from megatron_hdpo.apex import Apex, installed_apex

REQUIRED = (
    "torch",
    "megatron-core",
    "transformers",
    "safetensors",
    "pydantic",
    "math-verify",
    "pebble",
    "psutil",
    "einops",
)
OPTIONAL = (
    "transformer-engine",
    "apex",
    "triton",
    "reasoning-gym",
    "datasets",
    "tensorboard",
    "wandb",
    "mlflow",
    "sglang",
)


def main() -> None:
    """Print the findings; exits with 1 when something that every run needs is missing."""
    failed = False
    for line, fine in findings():
        print(f"{'ok  ' if fine else 'BAD '} {line}")
        failed |= not fine
    sys.exit(1 if failed else 0)


def findings() -> Iterator[tuple[str, bool]]:
    """(sentence, whether it is fine), cheap and without importing what may break."""
    yield f"Python {sys.version.split()[0]}, {os.cpu_count()} CPU cores", sys.version_info >= (3, 11)
    for name in REQUIRED:
        version = _version(name)
        yield f"{name} {version or 'is missing: pip install ' + name}", version is not None
    for name in OPTIONAL:
        yield f"{name} {_version(name) or 'not installed (optional)'}", True
    yield from _gpu()
    yield _transformer_engine()
    yield _apex()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> Iterator[tuple[str, bool]]:
    import torch

    if not torch.cuda.is_available():
        yield "no GPU: training runs on the CPU (gloo, plain torch layers)", True
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB", True


def _transformer_engine() -> tuple[str, bool]:
    """An installed but incomplete Transformer Engine makes `import megatron.core` itself die with a RuntimeError."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine: not installed, plain torch layers are used", True
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:
        return (
            f"Transformer Engine is installed but does not load ({type(error).__name__}: {error}); Megatron-Core "
            "cannot be imported beside it: complete it (transformer-engine[pytorch], for this torch and CUDA) or "
            "uninstall it",
            False,
        )
    return "Transformer Engine loads", True


_APEX: dict[Apex, tuple[str, bool]] = {
    "absent": ("Apex: not installed (not needed: Transformer Engine's or torch's optimizer is used)", True),
    "other project": (
        "the package apex is not NVIDIA's Apex but another project of that name, which gains nothing: "
        "pip uninstall apex",
        False,
    ),
    "without kernels": (
        "Apex was built without its CUDA extensions, which helps nothing: rebuild with APEX_CPP_EXT=1 APEX_CUDA_EXT=1",
        False,
    ),
    "without fused gradients": (
        "Apex with multi-tensor kernels (fused Adam and norms where Transformer Engine is absent), without "
        "fused_weight_gradient_mlp_cuda: weight gradients are not fused",
        True,
    ),
    "whole": (
        "Apex with its CUDA extensions: fused Adam and norms where Transformer Engine is absent, and weight gradients "
        "that Transformer Engine's layers add to their sums themselves",
        True,
    ),
}


def _apex() -> tuple[str, bool]:
    return _APEX[installed_apex()]
