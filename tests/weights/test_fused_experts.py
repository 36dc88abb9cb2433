"""Experts that one tensor holds for a whole layer, as transformers 5 may save them: loaded, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_helper import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoints import CASES, EXPERTS, SIZES, build, layout, make_checkpoint
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from megatron_hdpo.model.architecture import read_architecture
from megatron_hdpo.weights import hf_files
from megatron_hdpo.weights.convert import convert
from megatron_hdpo.weights.errors import WeightsError
from megatron_hdpo.weights.hf_files import INDEX_FILE, SINGLE_FILE, HfWeights
from megatron_hdpo.weights.load import check_weights, load_hf
from megatron_hdpo.weights.logprobs import packed_logprobs
from megatron_hdpo.weights.stream import stream_hf

SHAPES: dict[str, dict[str, Any]] = {
    "moe_narrow": {},
    "moe_square_gate_up": {"moe_intermediate_size": 32},
    "moe_square_down": {"moe_intermediate_size": 64, "tie_word_embeddings": True},
}
"""Of the last two, the two dimensions of one kind of tensor are equal: the shape does not tell their order."""
TWO_RANKS: list[dict[str, Any]] = [{"expert": 2}, {"tensor": 2, "sequence": True}, {"expert_tensor": 2}, {}]
EXPERT = "model.layers.{}.mlp.experts."


def sequences() -> list[np.ndarray]:
    generator = np.random.default_rng(5)
    return [generator.integers(0, 499, length) for length in (1, 40)]


def fused(single: dict[str, torch.Tensor], layers: range) -> dict[str, torch.Tensor]:
    """The tensors of a folder with those of the experts of some layers joined, by hand."""
    joined = dict(single)
    for layer in layers:
        stem = EXPERT.format(layer)
        gates, ups, downs = (
            [joined.pop(f"{stem}{expert}.{name}.weight") for expert in range(4)]
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        pairs = [torch.cat([gate, up]) for gate, up in zip(gates, ups, strict=True)]
        joined |= {stem + "gate_up_proj": torch.stack(pairs), stem + "down_proj": torch.stack(downs)}
    return joined


def write(folder: Path, tensors: dict[str, torch.Tensor], like: Path) -> Path:
    folder.mkdir(parents=True)
    shutil.copyfile(like / "config.json", folder / "config.json")
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / SINGLE_FILE, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By shape: `single`, as transformers saves by default; `saved`, as it saves its own parameters; by hand."""
    root = tmp_path_factory.mktemp("fused")
    for name, sizes in SHAPES.items():
        config = SIZES | EXPERTS | {"tie_word_embeddings": False} | sizes
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(CASES, name, lambda config=config: Qwen3MoeConfig(**config, norm_topk_prob=True))
            model = make_checkpoint(name, root / name / "single")
        model.save_pretrained(root / name / "saved", save_original_format=False)
        with torch.no_grad():
            logits = [model(torch.from_numpy(ids)[None]).logits[0] for ids in sequences()]
        torch.save([torch.log_softmax(values, dim=-1) for values in logits], root / name / "logprobs.pt")
        single = load_file(root / name / "single" / SINGLE_FILE)
        write(root / name / "by_hand", fused(single, range(1, 4)), root / name / "single")
    return root


def test_transformers_saves_what_is_joined_here_by_hand(folders: Path) -> None:
    for name in SHAPES:
        single, saved = (load_file(folders / name / form / SINGLE_FILE) for form in ("single", "saved"))
        by_hand = fused(single, range(4))
        assert saved.keys() == by_hand.keys() and EXPERT.format(3) + "gate_up_proj" in saved
        assert all(torch.equal(saved[key], by_hand[key]) for key in saved)


def _loads(folder: Path, layouts: list[dict[str, Any]]) -> None:
    for sizes in layouts:
        with layout(**{"tensor": 1, "pipeline": 1} | sizes) as context:
            for name in SHAPES:
                expected = load_file(folder / name / "single" / SINGLE_FILE)
                for form in ("saved", "by_hand"):
                    model, architecture = build(folder / name / form, context)
                    load_hf(model, architecture, context, folder / name / form)
                    streamed = dict(stream_hf(model, architecture, context))
                    assert all(torch.equal(value, expected[key]) for key, value in streamed.items())
                    assert streamed.keys() == expected.keys()
                found = packed_logprobs(model, architecture, context, sequences())
                theirs = torch.load(folder / name / "logprobs.pt") if found else []
                for our, their in zip(found, theirs, strict=True):
                    torch.testing.assert_close(our, their, atol=3e-5, rtol=1e-5)


def _exports(folder: Path, out: Path) -> None:
    with layout(1, 1, expert=2) as context:
        convert(folder, out, "huggingface", context)


def _both(folder: Path, out: Path) -> None:
    _loads(folder, TWO_RANKS)
    _exports(folder / "moe_narrow" / "saved", out)


def test_the_model_is_that_of_transformers_on_every_layout(folders: Path, tmp_path: Path) -> None:
    run_ranks(2, _both, folders, tmp_path / "out")
    exported, single = (load_file(f / SINGLE_FILE) for f in (tmp_path / "out", folders / "moe_narrow" / "single"))
    assert exported.keys() == single.keys() and all(torch.equal(exported[key], single[key]) for key in single)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        logits = model(torch.from_numpy(sequences()[-1])[None]).logits[0]
    expected = torch.load(folders / "moe_narrow" / "logprobs.pt")[-1]
    torch.testing.assert_close(torch.log_softmax(logits, dim=-1), expected, atol=1e-6, rtol=1e-6)


def test_shards_with_an_index(folders: Path, tmp_path: Path) -> None:
    source = folders / "moe_narrow" / "saved"
    tensors = load_file(source / SINGLE_FILE)
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, tmp_path / file)
    weight_map = {name: file for file, own in files.items() for name in own}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    check_weights(read_architecture(tmp_path), tmp_path)
    del weight_map[EXPERT.format(2) + "down_proj"]
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError, match=r"missing \(4\):\n    model\.layers\.2\.mlp\.experts\.0\.down_proj\.weight"):
        check_weights(read_architecture(tmp_path), tmp_path)


class _Recorded:
    """An open file that notes how many elements are read of it."""

    def __init__(self, file: Any, numbers: list[int]) -> None:
        self.file, self.numbers = file, numbers

    def __enter__(self) -> _Recorded:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def keys(self) -> list[str]:
        return self.file.keys()

    def get_slice(self, name: str) -> Any:
        view, numbers = self.file.get_slice(name), self.numbers

        class Slice:
            get_shape, get_dtype = view.get_shape, view.get_dtype

            def __getitem__(self, index: Any) -> torch.Tensor:
                values = view[index]
                numbers.append(values.numel())
                return values

        return Slice()


def test_a_rank_reads_its_own_experts_and_no_more(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    monkeypatch.setattr(hf_files, "safe_open", lambda *a, **k: _Recorded(safe_open(*a, **k), numbers))
    stem = EXPERT.format(0)
    with HfWeights(folders / "moe_narrow" / "saved") as weights:
        assert not numbers
        weights.read(stem + "1.up_proj.weight", 0, 5, 9)
        weights.read(stem + "3.down_proj.weight", 1, 0, 12)
    assert numbers == [4 * 64, 64 * 12]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_range_of_every_part_is_that_of_the_single_tensor(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    experts, channels, hidden = (data.draw(st.integers(1, 5)) for _ in range(3))
    gates, ups, downs = (
        torch.randn(shape)
        for shape in ((experts, channels, hidden), (experts, channels, hidden), (experts, hidden, channels))
    )
    folder = tmp_path_factory.mktemp("parts")
    stem = "model.layers.0.mlp.experts."
    save_file({stem + "gate_up_proj": torch.cat([gates, ups], 1), stem + "down_proj": downs}, folder / SINGLE_FILE)
    with HfWeights(folder) as weights:
        assert len(weights.names) == 3 * experts
        expert, dim = data.draw(st.integers(0, experts - 1)), data.draw(st.integers(0, 1))
        for name, whole in {"gate_proj": gates, "up_proj": ups, "down_proj": downs}.items():
            full = whole[expert]
            start = data.draw(st.integers(0, full.shape[dim]))
            stop = data.draw(st.integers(start, full.shape[dim]))
            found = weights.read(f"{stem}{expert}.{name}.weight", dim, start, stop)
            assert torch.equal(found, full.narrow(dim, start, stop - start))
            assert weights.shape(f"{stem}{expert}.{name}.weight") == tuple(full.shape)


def transposed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.mT if value.dim() == 3 else value for name, value in tensors.items()}


def three_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value[:3] if value.dim() == 3 else value for name, value in tensors.items()}


def both_forms(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {EXPERT.format(2) + "3.up_proj.weight": torch.zeros(24, 64)}


def suffixed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}.weight" if name.endswith(".down_proj") else name: value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ("moe_narrow", transposed, r"gate_proj\.weight: .* \(a part of .*\.gate_up_proj, which is \(4, 64, 48\)\)"),
        ("moe_square_gate_up", transposed, r"down_proj\.weight: \(32, 64\), expected \(64, 32\)"),
        ("moe_square_down", transposed, r"gate_proj\.weight: \(32, 128\), expected \(64, 64\)"),
        ("moe_narrow", three_experts, r"missing \(12\):\n    model\.layers\.0\.mlp\.experts\.3\.gate_proj\.weight"),
        ("moe_narrow", both_forms, r"holds .*experts\.3\.up_proj\.weight by itself and in .*experts\.gate_up_proj"),
        ("moe_narrow", suffixed, r"unexpected \(4\):\n    model\.layers\.0\.mlp\.experts\.down_proj\.weight"),
    ],
)
def test_what_transformers_would_not_load_is_refused(
    folders: Path, tmp_path: Path, shape: str, change: Any, message: str
) -> None:
    source = folders / shape / "saved"
    folder = write(tmp_path / "wrong", change(load_file(source / SINGLE_FILE)), source)
    with pytest.raises(WeightsError, match=message):
        check_weights(read_architecture(folder), folder)


def test_a_header_with_countless_experts_costs_nothing(tmp_path: Path) -> None:
    header = {"model.layers.0.mlp.experts.down_proj": {"dtype": "F32", "shape": [2**50, 0, 4], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (tmp_path / SINGLE_FILE).write_bytes(len(text).to_bytes(8, "little") + text)
    with HfWeights(tmp_path) as weights:
        assert weights.names == ["model.layers.0.mlp.experts.down_proj"]
