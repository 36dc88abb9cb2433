"""Errors of wrong weights, accepted extra tensors, and the state of the model after an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks
from safetensors.torch import load_file, save_file
from tiny_checkpoints import build, layout, make_checkpoint

from megatron_hdpo.weights.errors import WeightsError
from megatron_hdpo.weights.host import copy_to_host, load_from_host
from megatron_hdpo.weights.load import load_hf
from megatron_hdpo.weights.stream import stream_hf

State = dict[str, torch.Tensor]
GATE = "model.layers.1.mlp.gate_proj.weight"


def _edit(source: Path, target: Path, change: Callable[[State], Any]) -> Path:
    """A copy of a checkpoint with changed tensors."""
    state = load_file(source / "model.safetensors")
    change(state)
    target.mkdir()
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def _shard(source: Path, target: Path) -> Path:
    """Write the same tensors to two files with an index."""
    state = load_file(source / "model.safetensors")
    _edit(source, target, lambda state: None)
    (target / "model.safetensors").unlink()
    weight_map = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(sorted(state))}
    for file in set(weight_map.values()):
        save_file({name: state[name] for name in state if weight_map[name] == file}, target / file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


def _wrong_folders(plain: Path, tied: Path, folder: Path) -> list[tuple[Path, Path, list[str]]]:
    """(config's folder, weights' folder, texts that the message must hold)."""

    def edit(name: str, change: Callable[[State], Any], source: Path = plain) -> Path:
        return _edit(source, folder / name, change)

    several = edit(
        "several",
        lambda s: (s.pop(GATE), s.update(surprise=torch.ones(2)), s.update({"lm_head.weight": torch.ones(9, 9)})),
    )
    truncated, gone, lying = (_shard(plain, folder / name) for name in ("truncated", "gone", "lying"))
    (truncated / "part-0.safetensors").write_bytes((plain / "model.safetensors").read_bytes()[:3000])
    (gone / "part-1.safetensors").unlink()
    index = json.loads((lying / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "part-1.safetensors"
    index["weight_map"][GATE] = "part-0.safetensors"
    names = {name: file for name, file in index["weight_map"].items()}
    (lying / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "empty").mkdir()
    return [
        (
            plain,
            several,
            ["missing (1)", GATE, "unexpected (1)", "surprise", "lm_head.weight: (9, 9), expected (499, 64)"],
        ),
        (plain, edit("int", lambda s: s.update({GATE: s[GATE].to(torch.int8)})), ["quantised", f"{GATE}: I8"]),
        (plain, tied, ["missing (1)", "lm_head.weight"]),
        (
            tied,
            edit("head", lambda s: s.update({"lm_head.weight": torch.ones(499, 64)}), tied),
            ["tie_word_embeddings"],
        ),
        (plain, truncated, ["part-0.safetensors cannot be read"]),
        (plain, gone, ["part-1.safetensors cannot be read"]),
        (plain, lying, ["model.safetensors.index.json", "not in part-"]),
        (plain, folder / "empty", ["neither model.safetensors nor"]),
    ]


def _all_errors(plain: Path, tied: Path, folder: Path) -> None:
    with layout(1, 1) as context:
        for config, weights, texts in _wrong_folders(plain, tied, folder):
            model, architecture = build(config, context)
            with pytest.raises(WeightsError) as error:
                load_hf(model, architecture, context, weights)
            assert all(text in str(error.value) for text in texts), f"{weights.name}: {error.value}"
            if weights.name != "head":
                assert all(parameter.isnan().all() for parameter in model.parameters()), (
                    f"{weights.name} was half loaded"
                )
        _accepted(plain, tied, folder, context)
        _wrong_models(plain, context)


def _accepted(plain: Path, tied: Path, folder: Path, context: Any) -> None:
    """Rotary buffers, a stored head equal to tied embeddings, shards with an index, other floating-point types."""
    rotary = _edit(
        plain, folder / "rotary", lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    equal = _edit(
        tied, folder / "equal", lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()})
    )
    half = _edit(plain, folder / "half", lambda s: s.update({name: value.half() for name, value in s.items()}))
    for path in (rotary, equal, _shard(plain, folder / "sharded"), half):
        source = tied if path is equal else plain
        model, architecture = build(path, context)
        load_hf(model, architecture, context, path)
        expected = load_file(source / "model.safetensors")
        for name, value in stream_hf(model, architecture, context):
            assert torch.equal(value, expected[name].half().float() if path is half else expected[name])


def _wrong_models(plain: Path, context: Any) -> None:
    model, architecture = build(plain, context)
    snapshot = copy_to_host(model)
    other = replace(architecture, family="llama", qkv_bias=False, ffn_size=98)
    with pytest.raises(
        WeightsError, match=r"(?s)the table lacks.*linear_qkv\.bias.*linear_fc1\.weight.*the table says \(196"
    ):
        load_hf(model, other, context, plain)
    model.decoder.layers[0].layer_number = 3
    with pytest.raises(WeightsError, match=r"decoder layers: \[2, 1, 2, 3\]"):
        load_hf(model, architecture, context, plain)
    snapshot["extra"] = snapshot.pop("decoder.final_layernorm.weight")
    with pytest.raises(
        WeightsError, match=r"(?s)missing in the snapshot.*final_layernorm.*unknown to the model.*extra"
    ):
        load_from_host(model, snapshot)


def test_errors_name_everything(tmp_path: Path) -> None:
    make_checkpoint("qwen2", tmp_path / "plain")
    make_checkpoint("qwen2_tied", tmp_path / "tied")
    run_ranks(1, _all_errors, tmp_path / "plain", tmp_path / "tied", tmp_path)


def _drifted(path: Path) -> None:
    """Copies that drifted apart are an error, not one of them picked silently."""
    with layout(2, 1) as context:
        model, architecture = build(path, context)
        load_hf(model, architecture, context, path)
        snapshot = copy_to_host(model)
        with torch.no_grad():
            model.decoder.layers[1].input_layernorm.weight[0] += context.groups.tp.rank()
        with pytest.raises(WeightsError, match=r"model\.layers\.1\.input_layernorm\.weight differs between"):
            list(stream_hf(model, architecture, context))
        load_from_host(model, snapshot)
        assert {name for name, _ in stream_hf(model, architecture, context)} == load_file(
            path / "model.safetensors"
        ).keys()
    with layout(1, 2) as context:
        model, architecture = build(path, context)
        load_hf(model, architecture, context, path)
        if context.is_last_stage:
            with torch.no_grad():
                model.output_layer.weight[5, 5] += 1
            with pytest.raises(WeightsError, match=r"last stage's copy of model\.embed_tokens\.weight"):
                list(stream_hf(model, architecture, context, bucket_bytes=2**30))
        else:
            next(stream_hf(model, architecture, context, bucket_bytes=2**30))


def test_copies_that_drifted_apart_are_an_error(tmp_path: Path) -> None:
    make_checkpoint("qwen3_tied", tmp_path / "tied")
    run_ranks(2, _drifted, tmp_path / "tied")
