"""Report what this machine has, and which installed packages are broken.

Runs on any Python, without a single package: users call it when packages are missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Mapping

from megatron_hdpo.environment import EXTRAS, REMEDY, engine_does_not_load, project_is_installed
from megatron_hdpo.health.version_sets import PYTHONS, misfits, nearest
from megatron_hdpo.model.apex import Apex, installed_apex

# Requirements of setup.py, its extras left out.
REQUIRED = (
    "torch",
    "megatron-core",
    "psutil",
    "einops",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "pydantic",
    "PyYAML",
    "jinja2",
    "math-verify",
    "pebble",
    "aiohttp",
    "filelock",
    "orjson",
    "packaging",
    "tenacity",
    "rich",
    "shtab",
)
OPTIONAL = ("transformer-engine", "apex", "triton", "sglang")
VERSIONED = ("torch", "megatron-core", "transformers", "triton", "transformer-engine", "sglang")
MARKS = {True: "ok  ", False: "BAD ", None: "-   "}


def main() -> None:
    """Print the findings; exit with 1 when something that every run needs is missing."""
    failed = False
    for line, fine in findings():
        print(f"{MARKS[fine]} {line}")
        failed |= fine is False
    if failed and not project_is_installed():
        print(f"{sys.executable} is not the project's environment: {REMEDY}")
    sys.exit(1 if failed else 0)


def findings() -> Iterator[tuple[str, bool | None]]:
    """Yield (sentence, state) for each finding: True for fine, False for broken, None for absent but not needed.

    Imports nothing that may break.
    """
    yield f"Python {sys.version.split()[0]}, {os.cpu_count()} CPU cores", sys.version_info >= (3, 11)
    for name in REQUIRED:
        version = _version(name)
        missing = f"is missing: pip install {name}" if project_is_installed() else "is missing"
        yield f"{name} {version or missing}", version is not None
    for name in OPTIONAL:
        version = _version(name)
        yield f"{name} {version or 'not installed (optional)'}", True if version else None
    for name, extra in EXTRAS.items():
        version = _version(name)
        yield f"{name} {version or f'not installed (optional, extra {extra})'}", True if version else None
    yield from _set_at_hand(dict(_installed(VERSIONED)), ".".join(map(str, sys.version_info[:2])))
    yield from _gpu()
    yield from _precision()
    yield _transformer_engine()
    yield _apex()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _installed(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    yield from ((name, version) for name in names if (version := _version(name)) is not None)


def _set_at_hand(versions: Mapping[str, str], python: str) -> Iterator[tuple[str, bool | None]]:
    """Yield which set of `constraints` these versions are, or are nearest to, and what does not go together in them."""
    found = nearest(versions, python)
    if found is None:
        yield f"versions: there is no set for Python {python} ({', '.join(PYTHONS)} have one: docs/install.md)", None
    elif differing := found[1]:
        yield f"versions: nearest to the set {found[0].name}, but for {', '.join(differing)} (docs/install.md)", None
    else:
        yield f"versions: the set {found[0].name} (docs/install.md)", True
    for misfit in misfits(versions, python):
        yield misfit.text, False if misfit.fatal else None


def _gpu() -> Iterator[tuple[str, bool | None]]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        yield "no GPU: training runs on the CPU (gloo, plain torch layers)", None
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB", True


def _precision() -> Iterator[tuple[str, bool | None]]:
    """Yield the speed of bfloat16 on this CPU at the layer sizes of SmolLM2-135M; on a GPU, yield nothing.

    `dtype: auto` measures at the sizes of the recipe's own model, so the choice may differ from this one.
    """
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    from megatron_hdpo.model.dtype_speed import measure_bfloat16

    if torch.cuda.is_available():
        return
    speed = measure_bfloat16(hidden=576, channels=1536)
    taken = "float32" if speed.slow else "bfloat16"
    yield f"{speed} (a layer of 576 x 1536, for which dtype=auto takes {taken}; `check` measures a recipe's own)", True


def _transformer_engine() -> tuple[str, bool | None]:
    """Return the finding on Transformer Engine.

    With an installed but incomplete Transformer Engine, `import megatron.core` itself fails, with whatever error that
    raises: RuntimeError, FileNotFoundError and OSError have been seen.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine: not installed, plain torch layers are used", None
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:
        return engine_does_not_load(error), False
    return "Transformer Engine loads", True


_APEX: dict[Apex, tuple[str, bool | None]] = {
    "absent": ("Apex: not installed (not needed: Transformer Engine's or torch's optimizer is used)", None),
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


def _apex() -> tuple[str, bool | None]:
    return _APEX[installed_apex()]
