"""Run in a process of its own, without the interpreter: compile the kernels for sm_90, no GPU needed.

Prints registers and spilled bytes of every kernel; fails where a kernel does not compile or spills.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_hdpo.divergence import triton_kernels
from megatron_hdpo.divergence.triton_pass import block_and_warps

INT64 = {"ids_ptr", "support_ids_ptr"}
INT32 = {"row_ptr", "sorted_ids_ptr"}
WHOLE = {"z_stride", "g_stride", "start", "valid", "width", "vocab_size", "k"}


def signature(kernel: Any, logits: str, constants: dict[str, Any]) -> dict[str, str]:
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in ("z_ptr", "g_ptr"):
            types[name] = f"*{logits}"
        elif name.endswith("_ptr"):
            types[name] = "*i64" if name in INT64 else "*i32" if name in INT32 else "*fp32"
        else:
            types[name] = "i32" if name in WHOLE else "fp32"
    return types


def spilled(cubin: bytes) -> tuple[int, int]:
    """Registers, and stack bytes, as the tool that comes with Triton reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, f"no resource usage in: {text}"
    return int(found[1]), int(found[2])


def main() -> None:
    wide = block_and_warps(152064)
    full = dict(ENTROPY=True, TARGET=True, K=64)
    variants = [
        (triton_kernels.stats_kernel, dict(full, TWO=False, REST=False, BLOCK=wide["BLOCK"]), wide["num_warps"]),
        (triton_kernels.stats_kernel, dict(full, TWO=True, REST=True, BLOCK=wide["BLOCK"]), wide["num_warps"]),
        (triton_kernels.gradient_kernel, dict(full, LOGPROB=True, TWO=False, BLOCK=wide["BLOCK"]), wide["num_warps"]),
        (triton_kernels.gradient_kernel, dict(full, LOGPROB=True, TWO=True, BLOCK=wide["BLOCK"]), wide["num_warps"]),
    ]
    for tail in (0, 1, 2):
        variants.append((triton_kernels.finish_kernel, dict(full, TWO=False, KIND=2, TAIL=tail, CLIP=True), 2))
    bad = []
    for kernel, constants, warps in variants:
        source = ASTSource(kernel, signature(kernel, "bf16", constants), constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        registers, stack = spilled(made.asm["cubin"])
        print(f"{kernel.__name__} {constants} warps {warps}: {registers} registers, {stack} bytes of stack")
        bad += [kernel.__name__] if stack > 64 else []
    assert not bad, f"spilled registers: {bad}"


if __name__ == "__main__":
    main()
