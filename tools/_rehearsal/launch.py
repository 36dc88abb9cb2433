"""Start of a Python process on the null GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from _rehearsal.build import library

ROOT = Path(__file__).parents[2]
ENVIRONMENT = "MEGATRON_HDPO_REHEARSAL"
"""Variable that names the environment with torch's CUDA build; default: .venv-rehearsal."""


@dataclass(frozen=True)
class Device:
    """A GPU as its driver reports it. num_bytes: of memory that a process can allocate."""

    name: str
    num_bytes: int


DEVICES = {"h100": Device("NVIDIA H100 80GB HBM3", 84_974_239_744), "h200": Device("NVIDIA H200", 150_109_880_320)}


def interpreter() -> Path:
    """Return the Python of the environment for rehearsals: this one if its torch is built for CUDA."""
    torch = next((Path(path) / "torch" for path in sys.path if (Path(path) / "torch" / "lib").is_dir()), None)
    if torch is not None and (torch / "lib" / "libtorch_cuda.so").exists():
        return Path(sys.executable)
    return Path(os.environ.get(ENVIRONMENT, ROOT / ".venv-rehearsal")) / "bin" / "python"


def environment(device: Device, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables of a process on the null GPU. Raises RehearsalError where its library cannot be built."""
    built = library()
    return {
        **base,
        "LD_PRELOAD": str(built),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(built.parent), base.get("LD_LIBRARY_PATH")])),
        "TRITON_LIBCUDA_PATH": str(built.parent),
        "NULLGPU_BYTES": str(device.num_bytes),
        "NULLGPU_NAME": device.name,
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron asks for it with tensor parallelism
        # NCCL's watchdogs look for a hang, and nothing here can hang.
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    }


def replace_process(device: Device) -> None:
    """Start this process again on the null GPU, with the same arguments; do nothing if it is there already."""
    if "libnullgpu" not in os.environ.get("LD_PRELOAD", ""):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment(device))
