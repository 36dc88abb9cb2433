"""Traces of chosen steps, and the arithmetic and rates of every step."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import results_of, run_command
from recipes import Tree, small_recipe
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from megatron_hdpo.costs.cluster import GPUS, peak_flops_s
from megatron_hdpo.costs.flops import attention_flops, decoding_flops, forward_flops, product_flops
from megatron_hdpo.model.architecture import Architecture, parse_architecture
from megatron_hdpo.tracking.config import ProfileConfig
from megatron_hdpo.tracking.console import Console
from megatron_hdpo.tracking.metrics import read_metrics
from megatron_hdpo.tracking.profile import StepProfiler

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "eager",
}
MODELS = {"Qwen2ForCausalLM": Qwen2Config(**SIZES), "Qwen3ForCausalLM": Qwen3Config(**SIZES, head_dim=16)}


def _architecture(name: str) -> Architecture:
    return parse_architecture(MODELS[name].to_dict() | {"architectures": [name]})


@pytest.mark.parametrize("name", MODELS)
def test_arithmetic_is_what_torch_counts(name: str) -> None:
    """torch's counter sees every product of a transformers model, with attention over all pairs of tokens; causal
    attention is half of that."""
    architecture, length = _architecture(name), 48
    model = AutoModelForCausalLM.from_config(MODELS[name])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long))
    unseen = length * architecture.num_layers * attention_flops(architecture, length)
    assert forward_flops(architecture, [(length, length)]) + unseen == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long), logits_to_keep=5)
    assert forward_flops(architecture, [(length, 5)]) + unseen == counter.get_total_flops()


def test_sequences_cost_by_their_own_lengths() -> None:
    """Attention is quadratic: two sequences of 10 cost less than one of 20, by the pairs between them."""
    architecture = _architecture("Qwen2ForCausalLM")
    apart, joined = (forward_flops(architecture, s) for s in ([(10, 1), (10, 1)], [(20, 2)]))
    assert joined - apart == architecture.num_layers * 4 * 32 * 10 * 10
    # Sampling after a prefill is the whole sequence's pass, response by response.
    whole = forward_flops(architecture, [(25, 15)])
    assert forward_flops(architecture, [(10, 0)]) + decoding_flops(architecture, 10, 15) == whole


def test_a_mixture_counts_the_experts_that_a_token_visits() -> None:
    dense = _architecture("Qwen2ForCausalLM")
    mixture = replace(dense, num_experts=8, experts_per_token=2, expert_ffn_size=40)
    assert product_flops(mixture) - product_flops(dense) == 2 * 32 * 8  # 2 x 40 channels are the dense 80: the router


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", GPUS["h100"].flops_s),
        ("NVIDIA H200", GPUS["h200"].flops_s),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-80GB", None),
    ],
)
def test_peaks_of_devices_that_are_known(name: str, peak: float | None) -> None:
    assert peak_flops_s(name) == peak


def _events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def test_only_chosen_steps_and_ranks_are_traced(tmp_path: Path) -> None:
    config = ProfileConfig(steps=[2, 3], ranks=[1], record_shapes=True, memory=True)
    console = Console(enabled=False)
    for rank in (0, 1):
        profiler = StepProfiler(config, tmp_path, rank, torch.device("cpu"), console)
        for step in (1, 2, 3):
            with profiler.step(step), console.phase("train"):
                torch.ones(4, 5) @ torch.ones(5, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000002_rank_00001.json.gz",
        "step_00000003_rank_00001.json.gz",
    ]
    assert "time/write_trace_s" in console.timer.metrics()
    events = _events(tmp_path / "step_00000003_rank_00001.json.gz")
    assert any(event["name"] == "train" and event.get("cat") == "user_annotation" for event in events)
    product = next(event for event in events if event["name"] == "aten::mm")
    assert product["args"]["Input Dims"][:2] == [[4, 5], [5, 6]]
    assert any(event["name"] == "[memory]" for event in events)


def test_a_failed_step_leaves_no_trace(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfileConfig(steps=[1]), tmp_path / "profile", 0, torch.device("cpu"), Console(False))
    with pytest.raises(KeyError), profiler.step(1):
        raise KeyError("x")
    assert list((tmp_path / "profile").iterdir()) == []


@pytest.fixture(scope="module")
def two_ranks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tree, list[dict[str, Any]]]:
    """Two steps on TP 2, the second one traced on both ranks, MFU against a peak of 1 TFLOP/s."""
    folder = tmp_path_factory.mktemp("profiled")
    tree = small_recipe(tiny_model, folder / "run")
    tree |= {"parallel": {"tensor": 2}, "tracking": {"tensorboard": False}, "self_test": {"enabled": False}}
    tree["profile"] = {"steps": [2], "ranks": [0, 1], "peak_tflops": 1.0}
    tree["checkpoint"] = {"export": False}
    (folder / "recipe.yaml").write_text(json.dumps(tree))
    results_of(run_command("train", folder / "recipe.yaml", ranks=2))
    return tree, read_metrics(tree["output"])


def test_every_step_tells_its_rates(two_ranks: tuple[Tree, list[dict[str, Any]]]) -> None:
    for line in two_ranks[1][1:]:
        trained = line["train/tokens"] / line["time/train_s"] / 2
        assert line["perf/train_tokens_per_s_per_gpu"] == pytest.approx(trained)
        assert line["perf/rollout_tokens_per_s_per_gpu"] > 0
        assert line["memory/host_rss_gib"] > 0.1 and "memory/device_peak_gib" not in line
        for phase in ("train", "step"):
            assert line[f"perf/{phase}_mfu"] == pytest.approx(line[f"perf/{phase}_tflops_per_gpu"])
        # A parameter costs at least six operations per trained token; the step has all phases and takes longer.
        assert line["perf/train_tflops_per_gpu"] > 6e-12 * 12_000 * trained
        seconds = line["time/train_s"], line["time/step_s"]
        done = [line[f"perf/{p}_tflops_per_gpu"] * s for p, s in zip(("train", "step"), seconds, strict=True)]
        assert done[0] < done[1]
        assert line["comm/all_reduce_tp_bytes"] > 0 and not any("dp" in name for name in line if "comm/" in name)


def test_both_ranks_trace_the_chosen_step(two_ranks: tuple[Tree, list[dict[str, Any]]]) -> None:
    folder = Path(two_ranks[0]["output"]) / "profile"
    assert sorted(p.name for p in folder.iterdir()) == [f"step_00000002_rank_0000{r}.json.gz" for r in (0, 1)]
    names = {event["name"] for event in _events(folder / "step_00000002_rank_00001.json.gz")}
    assert {"rollout", "train", "sync", "evaluate"} <= names
    assert any("allreduce" in name or "all_reduce" in name for name in names)


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ({"steps": [0]}, "profile.steps: 0: the run has steps 1 to 2"),
        ({"steps": [1, 3]}, "profile.steps: 3: the run has steps 1 to 2"),
        ({"steps": [1], "ranks": [2]}, "profile.ranks: 2: the run has ranks 0 to 0"),
        ({"steps": [1], "peak_tflops": 0}, "profile.peak_tflops"),
    ],
)
def test_what_cannot_be_traced_is_refused(profile: Tree, says: str, tiny_model: Path, tmp_path: Path) -> None:
    tree = small_recipe(tiny_model, tmp_path / "run") | {"profile": profile}
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    ended = run_command("check", tmp_path / "recipe.yaml")
    assert ended.codes == [2] and says in ended.text
