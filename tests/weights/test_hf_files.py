"""Folders of safetensors in which a file and an index disagree, or whose tensors have names of another program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_hdpo.weights.errors import WeightsError
from megatron_hdpo.weights.hf_files import INDEX_FILE, SINGLE_FILE, HfWeights
from megatron_hdpo.weights.mapping import HfTensor


def write(folder: Path, file: str, *names: str) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    save_file({name: torch.zeros(2, 2) for name in names}, folder / file)


def write_index(folder: Path, **files: str) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": files}))


def names_in(folder: Path) -> list[str]:
    with HfWeights(folder) as weights:
        return weights.names


def test_a_single_file_beside_an_index_of_others_is_refused(tmp_path: Path) -> None:
    write(tmp_path, SINGLE_FILE, "a")
    write(tmp_path, "model-1.safetensors", "a")
    write_index(tmp_path, a="model-1.safetensors")
    with pytest.raises(WeightsError, match=r"holds model\.safetensors, and .*index\.json names other files"):
        names_in(tmp_path)
    (tmp_path / SINGLE_FILE).unlink()
    assert names_in(tmp_path) == ["a"]


def test_an_index_may_name_the_single_file_and_folders_inside(tmp_path: Path) -> None:
    write(tmp_path, SINGLE_FILE, "a")
    write(tmp_path / "more", "b.safetensors", "b")
    write_index(tmp_path, a=SINGLE_FILE, b="more/b.safetensors")
    assert names_in(tmp_path) == ["a", "b"]


def test_experts_of_their_own_are_not_taken_for_fused_ones(tmp_path: Path) -> None:
    own = "model.layers.0.mlp.experts.0.down_proj.weight"
    write(tmp_path, SINGLE_FILE, own)
    with HfWeights(tmp_path) as weights:
        assert weights.mismatches([HfTensor(own, (2, 2))]) == []
