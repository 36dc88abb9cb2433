"""Run by SGLang's interpreter with TRITON_INTERPRET=1: its own hash kernels over CPU tensors of the sizes in argv.

Prints one 16-digit hash per line. The tensors are those of `hashed_tensor` in word_digest_reference.py.
"""

import importlib.metadata
import importlib.util
import sys

import torch

# The file by itself: its package imports all of SGLang, which takes longer than the hashes do.
path = importlib.metadata.distribution("sglang").locate_file("sglang/kernels/ops/memory/gpu_tensor_hash.py")
spec = importlib.util.spec_from_file_location("gpu_tensor_hash", path)
ops = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ops)

TILE, SEED, CHUNK = 8192, 0x243F6A88, 1024


def sglang_hash(data):
    """What `gpu_tensor_hash` does, without its demand that the tensor be on a GPU."""
    padded = torch.zeros(-(-len(data) // 4) * 4, dtype=torch.uint8)
    padded[: len(data)] = data
    words = padded.view(torch.uint32)
    partials = torch.empty(-(-len(words) // TILE), dtype=torch.uint64)
    ops.hash_tiles32_kernel_blocked[(len(partials),)](
        words,
        partials,
        len(words),
        seed1=SEED,
        seed2=((SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF,
        FM_C1=ops.FMIX32_C1,
        FM_C2=ops.FMIX32_C2,
        POS_A=ops.POS_C1,
        POS_B=ops.POS_C2,
        TILE=TILE,
        BLOCK=256,
        USE_CG=False,
    )
    while len(partials) > 1:
        fewer = torch.empty(-(-len(partials) // CHUNK), dtype=torch.uint64)
        ops.add_tree_reduce_u64_kernel[(len(fewer),)](partials, fewer, len(partials), CHUNK=CHUNK)
        partials = fewer
    return ops._final_splitmix64(int(partials.item()))


for size in map(int, sys.argv[1:]):
    generator = torch.Generator().manual_seed(size)
    tensor = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    print(f"{sglang_hash(tensor):016x}", flush=True)
