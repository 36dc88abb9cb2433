"""Build of the device library: the C++ of `device/`, and a function that succeeds for all else that torch calls."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from _rehearsal.errors import RehearsalError

SOURCES = Path(__file__).parent / "device"
CACHE = Path(__file__).parents[2] / ".cache" / "rehearsal"
LIBRARY = "libnullgpu.so"
# Libraries of torch that call CUDA.
_CALLERS = ("libc10_cuda.so", "libtorch_cuda.so", "libtorch_python.so", "libtorch_cuda_linalg.so", "libcaffe2_nvrtc.so")
_ANSWERED = re.compile(r"^(__cuda|cuda|cublas|nccl|cu[A-Z])")
# Not answered: the real libraries, which no part of a rehearsal calls.
_OTHERS = ("cuFile", "cudnn", "cusolver", "cusparse", "cufft", "curand")
# Looked up by name while the program runs, so that no library lists them.
_BY_NAME = (
    *("cuCtxCreate_v2", "cuCtxGetLimit", "cuCtxPopCurrent_v2", "cuCtxPushCurrent_v2", "cuCtxSetLimit"),
    *("cuCtxSynchronize", "cuDeviceGetUuid_v2", "cuFuncSetAttribute", "cuFuncSetCacheConfig", "cuInit"),
    *("cuLibraryUnload", "cuMemAddressFree", "cuMemAddressReserve", "cuMemCreate", "cuMemExportToShareableHandle"),
    *("cuMemGetAllocationGranularity", "cuMemImportFromShareableHandle", "cuMemMap", "cuMemRelease", "cuMemSetAccess"),
    *("cuMemUnmap", "cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2", "cuMemsetD32Async", "cuMemsetD8Async"),
    *("cuModuleUnload", "cuMulticastAddDevice", "cuMulticastBindMem", "cuMulticastCreate"),
    *("cuMulticastGetGranularity", "cuMulticastUnbind", "cuStreamSynchronize", "cuStreamWriteValue32"),
    *("cuTensorMapEncodeTiled", "cuCtxSetCurrent"),
)


def library() -> Path:
    """Return the path of the library for the installed torch, built if it is not there.

    Raises RehearsalError without torch's CUDA build, a C++ compiler or the headers of CUDA.
    """
    torch = torch_folder()
    sources = sorted(SOURCES.glob("*.cpp"))
    said = [version("torch"), *(path.read_text() for path in (SOURCES / "nullgpu.h", Path(__file__), *sources))]
    folder = CACHE / hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]
    if not (folder / LIBRARY).exists():
        _build(folder, sources, torch)
    return folder / LIBRARY


def torch_folder() -> Path:
    """Return the folder of the installed torch. Raises RehearsalError where it is no CUDA build."""
    found = importlib.util.find_spec("torch")
    folder = Path(found.origin).parent if found is not None and found.origin is not None else None
    if folder is None or not (folder / "lib" / "libtorch_cuda.so").exists():
        raise RehearsalError(
            "a rehearsal needs torch's build for CUDA, and this environment has none: `make rehearsal-env`, then "
            ".venv-rehearsal/bin/python"
        )
    return folder


def _build(folder: Path, sources: Iterable[Path], torch: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise RehearsalError("a rehearsal compiles 900 lines of C++: install g++, or name another compiler with CXX")
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    rest = partial / "rest.cpp"
    rest.write_text("".join(successes(sources, torch)))
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{headers(torch)}"]
    run = subprocess.run(
        [*command, "-o", partial / LIBRARY, *sources, rest, "-ldl"], capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RehearsalError(f"the device library of the rehearsal does not compile:\n{run.stderr}")
    # Where Triton looks for the driver.
    (partial / "libcuda.so.1").symlink_to(LIBRARY)
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial)


def headers(torch: Path) -> Path:
    """Return the folder with the headers of CUDA: of the packages beside torch, or of CUDA_HOME."""
    beside = sorted((torch.parent / "nvidia").glob("cu*/include"))
    for folder in (*beside, Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"):
        if (folder / "cuda.h").exists() and (folder / "cuda_runtime_api.h").exists():
            return folder
    raise RehearsalError(
        "no cuda.h beside torch and in CUDA_HOME: `make rehearsal-env` installs nvidia-cuda-crt for it"
    )


def successes(sources: Iterable[Path], torch: Path) -> Iterator[str]:
    """Yield a function that returns 0 for everything that torch calls and the sources do not define."""
    defined = {name for path in sources for name in re.findall(r"API [^;{(]*?\b(\w+)\(", path.read_text())}
    wanted = set(_BY_NAME)
    for name in _CALLERS:
        wanted |= _undefined(torch / "lib" / name)
    for name in sorted(wanted - defined):
        if _ANSWERED.match(name) and not name.startswith(_OTHERS):
            yield f'extern "C" __attribute__((visibility("default"))) long {name}(...) {{ return 0; }}\n'


def _undefined(library: Path) -> set[str]:
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=False)
    return {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines() if line.strip()}
