"""Run by SGLang's interpreter: open the text of a request (stdin) as a server does, up to where a GPU is needed.

argv: UUID of the GPU, which this process is to see as its first. Prints the device and the bytes of the tensor.
"""

import sys
from types import SimpleNamespace

import torch
from sglang.srt.utils.common import MultiprocessingSerializer
from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
from torch.multiprocessing import reductions

torch.cuda.device_count = lambda: 2
torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=sys.argv[1] if index == 0 else "another")
names = reductions.rebuild_cuda_tensor.__code__.co_varnames[: reductions.rebuild_cuda_tensor.__code__.co_argcount]
reductions.rebuild_cuda_tensor = lambda *values: dict(zip(names, values, strict=True))
monkey_patch_torch_reductions()
opened = MultiprocessingSerializer.deserialize(sys.stdin.read())
tensor = opened["flattened_tensor"]
assert [(part.name, part.start_idx, part.end_idx) for part in opened["metadata"]] == [("a", 0, 60), ("b", 60, 76)]
print("device", tensor["storage_device"], "bytes", tensor["tensor_size"][0])
