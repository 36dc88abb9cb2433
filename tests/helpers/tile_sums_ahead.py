"""Run in a process of its own, without the interpreter: compile the digest's kernel for sm_90, no GPU needed.

Prints the machine code's counts; fails where the kernel does not compile, spills, or reads a word at a time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_hdpo.rollout.sglang.weights import tile_sums
from megatron_hdpo.rollout.sglang.weights.word_digests import TILE_WORDS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def of_cubin(tool: str, *flags: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout


def main() -> None:
    kernel, threads = tile_sums.tile_sums_kernel, 32 * tile_sums.NUM_WARPS
    for rows in (False, True):
        constants = {"ROWS": rows, "TILE": TILE_WORDS, "BLOCK": tile_sums.BLOCK_WORDS}
        names = [name for name in kernel.arg_names if name not in constants]
        types = {name: "*i32" if name.endswith("_ptr") else "i32" for name in names} | dict.fromkeys(
            constants, "constexpr"
        )
        # Sizes of real models are multiples of 16 words; Triton specialises on that at launch.
        aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}
        source = ASTSource(kernel, {n: types[n] for n in kernel.arg_names}, constexprs=constants, attrs=aligned)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tile_sums.NUM_WARPS}).asm[
            "cubin"
        ]
        usage = of_cubin("cuobjdump", "--dump-resource-usage", cubin=made)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found and int(found[2]) == 0, usage
        code = of_cubin("nvdisasm", "-c", cubin=made)
        loads = re.findall(r"\bLDG\.[A-Z0-9.]+", code)
        per_word = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)) / (TILE_WORDS / threads)
        print(f"tile_sums_kernel rows={rows}: {found[1]} registers, {per_word:.1f} instructions per word, {loads[:1]}")
        assert loads and all(load.endswith(".128") for load in loads), loads
        assert per_word < 40


if __name__ == "__main__":
    main()
