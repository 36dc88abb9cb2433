"""Sampling of the embedded engine on CUDA, seen on the null GPU: kernels of attention and host waits per token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from host_waits import host_waits
from null_gpu import needs_null_gpu, on_null_gpu

STEPS = 5


def decode(gpu: Any) -> dict[str, Any]:
    """Kernels of a prefill and of some decoding steps, and the waits of those steps by place."""
    import torch
    from transformers import Qwen2Config

    from megatron_hdpo.rollout.embedded_model import EmbeddedModel
    from megatron_hdpo.rollout.token_sampling import row_params, sample

    torch.backends.cuda.enable_cudnn_sdp(True)  # as in a run: elsewhere on the null GPU it is off
    device = torch.device("cuda", 0)
    sizes = {"hidden_size": 768, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1024}
    config = Qwen2Config(**sizes, num_attention_heads=12, num_key_value_heads=2)
    model = EmbeddedModel(config, torch.bfloat16, device, None)
    with torch.inference_mode():
        for parameter in model._model.parameters():
            parameter.data = torch.empty(1, dtype=torch.bfloat16, device=device)
        for name, shape in model._shapes.items():
            model._model.get_parameter(name).data = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        prompts = [np.arange(n, dtype=np.int32) for n in (70, 33, 51)]
        lengths = np.array([len(prompt) for prompt in prompts])
        with gpu.counted():
            _, prefilled = model.prefill(prompts)
        names = {"prefill": _attention(gpu)}
        cache = model.new_cache(10_000)
        cache.reserve(3, 80, like=prefilled)
        for row, length in enumerate(lengths.tolist()):
            cache.insert(row, 1, prefilled, row, length)
        params = row_params([1.0] * 3, [None] * 3, [1.0] * 3, 1024, device)
        with host_waits() as places, gpu.counted():
            for step in range(STEPS):
                logits = model.decode(np.array([1, 2, 3]), lengths + step, cache)
                sample(logits, torch.zeros(3, 2, dtype=torch.float64, device=device), params)
        names["decode"] = _attention(gpu)
    return {"names": names, "waits": dict(places), "calls": gpu.total("S")}


def _attention(gpu: Any) -> list[str]:
    parts = ("flash", "fmha", "softmax", "splitkv")
    return [count.name for count in gpu.counts() if count.kind == "K" and any(part in count.name for part in parts)]


@pytest.mark.long
@needs_null_gpu
def test_decoding_takes_fused_kernels_and_waits_for_nothing() -> None:
    """The one wait of a step is the engine's, for the tokens that were drawn."""
    found = on_null_gpu(decode)
    assert any("flash_fwd" in name for name in found["names"]["prefill"])
    assert found["names"]["decode"] and not any("softmax" in name for name in found["names"]["decode"])
    assert found["waits"] == {} and found["calls"] == 0
