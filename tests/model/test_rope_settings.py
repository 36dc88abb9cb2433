"""RoPE settings of every form of config.json: read as `transformers` reads them, or refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_hdpo.model.architecture import Architecture, ArchitectureError, parse_architecture

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 499,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
THETAS = st.sampled_from([None, 10_000.0, 500_000, 1e6])
SECTIONS = st.none() | st.builds(
    lambda kind, key, theta, rest, factor: (
        ({} if kind is None else {key: kind})
        | ({} if theta is None else {"rope_theta": theta})
        | rest
        | ({} if factor is None else {"factor": factor})
    ),
    st.sampled_from([None, "default", "llama3", "linear", "dynamic", "yarn"]),
    st.sampled_from(["rope_type", "type"]),
    THETAS,
    st.sampled_from([{}, LLAMA3]),
    st.sampled_from([None, 4.0]),
)


def frequencies(architecture: Architecture) -> torch.Tensor:
    """Frequencies of the model that is built, by the definition and Llama 3's published scaling."""
    dim = torch.arange(0, architecture.head_dim, 2, dtype=torch.float64) / architecture.head_dim
    plain = 1.0 / architecture.rope_theta**dim
    if architecture.rope_scaling is None:
        return plain
    wavelength = 2 * torch.pi / plain
    smooth = ((8192 / wavelength - 1.0) / (4.0 - 1.0)).clamp(0, 1)
    return (1 - smooth) * plain / architecture.rope_scaling + smooth * plain


@settings(deadline=None, max_examples=300)
@given(theta=THETAS, old=SECTIONS, new=SECTIONS)
def test_ours_are_those_of_transformers(
    theta: float | None, old: Any, new: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = copy.deepcopy(CONFIG)
    config |= {"rope_theta": theta} if theta is not None else {}
    config |= {"rope_scaling": old} if old is not None else {}
    config |= {"rope_parameters": new} if new is not None else {}
    try:
        ours = parse_architecture(copy.deepcopy(config))
    except (ArchitectureError, KeyError):
        return
    folder = tmp_path_factory.mktemp("config")
    (Path(folder) / "config.json").write_text(json.dumps(config))
    theirs = LlamaRotaryEmbedding(config=AutoConfig.from_pretrained(folder))
    assert theirs.attention_scaling == 1.0
    torch.testing.assert_close(frequencies(ours).float(), theirs.inv_freq, rtol=2e-6, atol=0, msg=f"{config}")
