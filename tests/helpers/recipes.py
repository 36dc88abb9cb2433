"""A tiny model and recipes of runs that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_hdpo.model.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]
Tree = dict[str, Any]


def make_model(path: Path, **sizes: Any) -> Path:
    """A tiny checkpoint whose weights are large enough that distributions differ from position to position."""
    make_tiny_model(path, **({"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64} | sizes))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    model.save_pretrained(path)
    return path


def small_recipe(model: Path, output: Path) -> dict[str, Any]:
    """HDPO for two steps on digit sums; every group is likely a cliff, and some privileged rollout right."""
    return {
        "output": str(output),
        "device": "cpu",
        "threads_per_rank": 1,
        "model": {"path": str(model), "dtype": "float32"},
        "data": {
            "train": [{"kind": "digit_sums", "name": "sums", "lengths": [2, 3], "size": 40}],
            "evaluation": [{"kind": "digit_sums", "name": "held_out", "lengths": [3], "size": 4, "seed": 9}],
            "prompts": {
                "chat": False,
                "student": "{{ question }}",
                "privileged": "{{ solution }}#{{ question }}",
                "privileged_context": "solution",
                "max_prompt_tokens": 16,
                "max_privileged_tokens": 32,
            },
        },
        "reward": {"workers": 1},
        "rollout": {
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "max_new_tokens": 8,
            "embedded": {"dtype": "float32"},
        },
        "objective": {"name": "hdpo", "distill": {"kind": "forward_kl", "coefficient": 0.3, "top_k": 8}},
        "optimizer": {"lr": 1.0e-3},
        "train": {"steps": 2, "micro_batch_tokens": 256},
        "evaluation": {"samples": 2, "k": [1, 2]},
        "self_test": {"prompts": 2, "max_new_tokens": 4},
    }
