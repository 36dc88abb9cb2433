"""Run in a process of its own, without the interpreter: compile the kernels for sm_90, no GPU needed.

Prints for every kernel its registers, and the instructions per logit of its loop; fails where one spills, needs more
instructions than a GPU can issue at the bandwidth of its memory, or loads less than 128 bits at a time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_hdpo.divergence import triton_kernels
from megatron_hdpo.divergence.triton_pass import launch_shape

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INT64 = {"ids_ptr", "support_ids_ptr"}
INT32 = {"row_ptr", "holes_ptr"}
WHOLE = {"z_stride", "g_stride", "start", "valid", "width", "vocab_size", "k"}
LOGITS = {"z_ptr", "g_ptr"}
ALIGNED = LOGITS | {"z_stride", "g_stride"}
REGISTERS, THREADS = 65536, 2048  # of an SM


@dataclass(frozen=True)
class Variant:
    """A kernel with its compile-time choices, and the most instructions per logit of its loop; None: it has none."""

    kernel: str
    most: float | None
    choices: dict[str, Any]
    dtype: str = "bf16"
    width: int = 151_936

    @property
    def shape(self) -> dict[str, int]:
        if self.kernel == "finish_kernel":
            return {"num_warps": 2}
        return launch_shape(self.width, 2 if self.dtype == "bf16" else 4)

    def compiled(self) -> bytes:
        """Compile to a cubin."""
        kernel, shape = getattr(triton_kernels, self.kernel), self.shape
        constants = {**self.choices, **{k: v for k, v in shape.items() if k != "num_warps"}}
        attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in ALIGNED}
        source = ASTSource(kernel, self.signature(kernel, constants), constexprs=constants, attrs=attributes)
        target = GPUTarget("cuda", 90, 32)
        return triton.compile(source, target=target, options={"num_warps": shape["num_warps"]}).asm["cubin"]

    def signature(self, kernel: Any, constants: dict[str, Any]) -> dict[str, str]:
        types = {}
        for name in kernel.arg_names:
            if name in constants:
                types[name] = "constexpr"
            elif name in LOGITS:
                types[name] = f"*{self.dtype}"
            elif name.endswith("_ptr"):
                types[name] = "*i64" if name in INT64 else "*i32" if name in INT32 else "*fp32"
            else:
                types[name] = "i32" if name in WHOLE else "fp32"
        return types


def read_with(tool: str, *options: str, cubin: bytes) -> str:
    """Return what a tool that comes with Triton prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    text = read_with("cuobjdump", "--dump-resource-usage", cubin=cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, f"no resource usage in: {text}"
    return int(found[1]), int(found[2])


def loops(cubin: bytes) -> Iterator[list[str]]:
    """Yield the instructions of every loop: from the target of a backward branch to the branch."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in read_with("nvdisasm", "-c", cubin=cubin).splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*);", line):
            instructions.append(code[1])
            to = re.search(r"\.L_\w+", code[2]) if code[1].startswith("BRA") else None
            if to and labels.get(to[0], len(instructions)) < len(instructions) - 1:
                yield instructions[labels[to[0]] :]


def report(variant: Variant) -> list[str]:
    """Print a kernel's figures; return what is wrong with them."""
    cubin = variant.compiled()
    registers, stack = resources(cubin)
    shape = variant.shape
    threads = 32 * shape["num_warps"]
    occupancy = min(THREADS, REGISTERS // (-(-registers // 8) * 8 * threads) * threads) / THREADS
    said = f"{variant.kernel} {variant.dtype} {variant.choices}: {registers} registers, {stack} bytes of stack"
    wrong = ["spills"] if stack else []
    if variant.most is not None:
        body = next(body for body in loops(cubin) if sum(op.startswith("MUFU.EX2") for op in body) > 4)
        cost = len(body) / (shape["CHUNKS"] * shape["VECTOR"])
        loads = [op for op in body if op.startswith("LDG")]
        said += f", occupancy {occupancy:.0%}, {cost:.2f} instructions per logit, {loads}"
        wrong += [f"costs more than {variant.most}"] if cost > variant.most else []
        wrong += ["loads less than 128 bits"] if sum(".128" in op for op in loads) != shape["CHUNKS"] else []
        wrong += ["occupies less than half of an SM"] if occupancy < 0.5 else []
    print(said, flush=True)
    return [f"{said}: {what}" for what in wrong]


def variants() -> Iterator[Variant]:
    """Yield the variants to compile. A turn of the bucket's loop includes the search for an id of the support."""
    none = dict(ENTROPY=False, TWO=False, TARGET=False, REST=False, FINISH=True, KIND=2, TAIL=0, CLIP=False, K=64)
    usual = {**none, "ENTROPY": True, "TARGET": True}
    forward, gradient = "forward_kernel", "gradient_kernel"
    yield Variant(forward, 9.0, usual)
    yield Variant(forward, 9.0, {**usual, "FINISH": False}, width=19_008)
    yield Variant(forward, 9.0, usual, dtype="fp32")
    yield Variant(forward, 7.0, none)
    yield Variant(forward, 7.0, {**usual, "ENTROPY": False})
    yield Variant(forward, 12.5, {**usual, "TWO": True, "CLIP": True})
    yield Variant(forward, 14.0, {**usual, "REST": True, "TAIL": 1})
    for tail in (0, 1, 2):
        choices = {**usual, "TAIL": tail, "CLIP": True, "REST": tail == 1}
        yield Variant("finish_kernel", None, {k: v for k, v in choices.items() if k != "FINISH"})
    upstream = dict(LOGPROB=True, ENTROPY=True, TARGET=True, TWO=False, K=64)
    yield Variant(gradient, 8.0, upstream)
    yield Variant(gradient, 7.0, upstream, dtype="fp32")
    yield Variant(gradient, 6.0, {**upstream, "ENTROPY": False})
    yield Variant(gradient, 11.0, {**upstream, "TWO": True})


def main() -> None:
    with ThreadPoolExecutor(2) as pool:
        wrong = [line for lines in pool.map(report, variants()) for line in lines]
    assert not wrong, "\n".join(wrong)


if __name__ == "__main__":
    main()
