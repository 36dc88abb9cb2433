"""`save_hf`: a folder that `transformers` loads, whole or in shards, complete or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed_helper import run_ranks
from tiny_checkpoints import build, layout, make_checkpoint
from transformers import AutoModelForCausalLM

from megatron_hdpo.weights.errors import WeightsError
from megatron_hdpo.weights.host import copy_to_host
from megatron_hdpo.weights.load import load_hf
from megatron_hdpo.weights.save import save_hf


def _saves(source: Path, out: Path, tensor: int, pipeline: int) -> None:
    with layout(tensor, pipeline) as context:
        model, architecture = build(source, context)
        load_hf(model, architecture, context, source)
        save_hf(model, architecture, context, source, out / "whole")
        save_hf(model, architecture, context, source, out / "sharded", max_shard_bytes=100_000)
        save_hf(model, architecture, context, source, out / "half", dtype=torch.bfloat16)
        before = copy_to_host(model)
        load_hf(model, architecture, context, out / "sharded")
        assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
        with pytest.raises(WeightsError, match=r"whole exists: remove it"):
            save_hf(model, architecture, context, source, out / "whole")
        with pytest.raises(WeightsError, match="choose another"):
            save_hf(model, architecture, context, source, source, overwrite=True)
        with pytest.raises(WeightsError, match=r"Not a directory|NotADirectoryError|FileExistsError"):
            save_hf(model, architecture, context, source, source / "config.json" / "below")
        with torch.no_grad():
            model.decoder.layers[0].mlp.linear_fc2.weight.mul_(2)
        save_hf(model, architecture, context, source, out / "whole", overwrite=True)


@pytest.mark.parametrize(("case", "ranks", "tensor", "pipeline"), [("qwen2_tied", 2, 1, 2), ("llama", 2, 1, 1)])
def test_saved_folder(tmp_path: Path, case: str, ranks: int, tensor: int, pipeline: int) -> None:
    source, out = tmp_path / case, tmp_path / "out"
    reference = make_checkpoint(case, source)
    (source / "tokenizer.json").write_text("{}")
    (source / "training_state.pt").write_text("not to be copied")
    run_ranks(ranks, _saves, source, out, tensor, pipeline)

    expected = reference.state_dict()
    for folder, dtype in (("sharded", torch.float32), ("half", torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(out / folder)
        assert model.dtype == dtype
        loaded = model.state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name].to(dtype)) for name in expected)
    changed = AutoModelForCausalLM.from_pretrained(out / "whole").state_dict()
    doubled = [name for name in expected if not torch.equal(changed[name], expected[name])]
    assert doubled == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(0, 4, 4 // pipeline)]

    assert sorted(path.name for path in out.iterdir()) == ["half", "sharded", "whole"]
    names = {path.name for path in (out / "whole").iterdir()}
    (tmp_path / "own").touch()
    modes = {path.stat().st_mode for path in out.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "own").stat().st_mode}, "safetensors would leave its files to their owner alone"
    assert names == {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}
    index = json.loads((out / "sharded" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in reference.parameters())
