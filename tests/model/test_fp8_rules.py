"""Tensors that bfloat16 training keeps in float32, recompute without effect on results, and allowed uses of FP8."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from distributed_helper import run_ranks
from layout_cases import share
from recipes import small_recipe
from tiny_policy import OPTIMIZER, SIZES, SPEC, build_policy, gradients_of, joined, make_checkpoint, make_examples
from transformers import LlamaConfig

from megatron_hdpo.config import RecipeError, check_recipe, parse_recipe
from megatron_hdpo.config.precision import resolve
from megatron_hdpo.model import megatron_config
from megatron_hdpo.model.architecture import Architecture, read_architecture
from megatron_hdpo.model.build import build_model
from megatron_hdpo.model.config import ModelConfig, ModelError
from megatron_hdpo.model.fp8_rules import alignment, precision_errors, precision_warnings, runtime_error
from megatron_hdpo.model.megatron_config import transformer_config
from megatron_hdpo.parallel.layout import ParallelConfig

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"recompute": "full"},
    "core_attn": {"recompute": "selective"},
    "mlp": {"recompute": "selective", "recompute_modules": ["mlp"]},
    "both": {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
}


def run_cases(path: Path, layout: dict[str, Any]) -> dict[str, Any]:
    with joined(**layout) as context:
        gradients, saved = {}, {}
        for name, options in RECOMPUTE.items():
            policy = build_policy(path, context, budget=1000, model=options)
            saved[name] = _saved_bytes(lambda p=policy: p.accumulate_gradients(share(p, make_examples()), SPEC))
            gradients[name] = gradients_of(policy)
        return {"gradients": gradients, "saved": saved, "bfloat16": _bfloat16(path, context)}


def _saved_bytes(work: Any) -> int:
    """Bytes that the forward pass of one micro-batch keeps for the backward pass, parameters included."""
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if torch._C._current_graph_task_id() == -1:  # what the backward pass computes again is not kept
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(held.values())


def _bfloat16(path: Path, context: Any) -> dict[str, Any]:
    """Types of everything that a step leaves, and what updates below bfloat16's resolution come to."""
    small = OPTIMIZER.model_copy(update={"lr": 1e-5, "warmup_steps": 0, "weight_decay": 0.0, "eps": 1e-8})
    policy = build_policy(path, context, optimizer=small, dtype="bfloat16")
    distributed = policy.optimizer.chained_optimizers[0]
    mains = [main for group in distributed.shard_fp32_from_float16_groups for main in group]
    before = [main.clone() for main in mains]
    for seed in (0, 3):
        policy.update(share(policy, make_examples(seed)), SPEC)
    return {
        "weights": {p.dtype for p in policy.model.parameters()},
        "gradients": {p.main_grad.dtype for p in policy.model.parameters()},
        "reduced in": {buffer.grad_data.dtype for buffer in policy.ddp.buffers},
        "main": {main.dtype for main in mains},
        "moments": {v.dtype for s in distributed.optimizer.state.values() for k, v in s.items() if k != "step"},
        "moved": max(float((a - b).abs().max()) for a, b in zip(mains, before, strict=True)),
        "off the grid": any(bool((m != m.bfloat16().float()).any()) for m in mains),
    }


@pytest.fixture(scope="module", params=[{}, {"tensor": 2, "sequence": True}], ids=["one rank", "tp2_sp"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = make_checkpoint("qwen3_tied", tmp_path_factory.mktemp("precision"))
    return run_ranks(request.param.get("tensor", 1), run_cases, path, request.param)


@pytest.mark.parametrize("recompute", [name for name in RECOMPUTE if name != "none"])
def test_recompute_changes_no_gradient(found: list[dict[str, Any]], recompute: str) -> None:
    for rank in found:
        for name, expected in rank["gradients"]["none"].items():
            np.testing.assert_array_equal(rank["gradients"][recompute][name], expected, err_msg=name)


def test_recompute_keeps_less(found: list[dict[str, Any]]) -> None:
    for rank in found:
        saved = rank["saved"]
        assert saved["full"] < saved["both"] < min(saved["mlp"], saved["core_attn"])
        assert max(saved["mlp"], saved["core_attn"]) < saved["none"]


def test_bfloat16_accumulates_in_float32(found: list[dict[str, Any]]) -> None:
    for rank in found:
        types = rank["bfloat16"]
        assert types["weights"] == {torch.bfloat16}
        assert types["gradients"] == types["reduced in"] == types["main"] == types["moments"] == {torch.float32}
        # Two steps of 1e-5 on weights around 0.1 and 1: none of them shows in bfloat16, both are in the main weights.
        assert 1.5e-5 < types["moved"] < 2.5e-5
        assert types["off the grid"]


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    folder = tmp_path_factory.mktemp("architecture")
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 96}
    LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return read_architecture(folder)


FP8_SERVERS = {"quantization": "fp8", "extra_args": {"load-format": "flash_rl"}}


def fp8(**options: Any) -> ModelConfig:
    defaults = {"path": "", "dtype": "bfloat16", "spec": "transformer_engine", "fp8": "hybrid"}
    return ModelConfig(**(defaults | options))


def emulated(**options: Any) -> ModelConfig:
    return ModelConfig(**({"path": "", "spec": "torch", "fp8_emulation": "blockwise"} | options))


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_fp8_that_can_be(recipe: str, architecture: Architecture) -> None:
    assert not list(precision_errors(fp8(fp8_recipe=recipe), ParallelConfig(tensor=2), architecture))


@pytest.mark.parametrize(
    ("config", "layout", "reason"),
    [
        (fp8(spec="torch"), {}, "model.fp8: needs model.spec=transformer_engine"),
        (fp8(dtype="float32"), {}, "model.fp8: needs model.dtype=bfloat16, not float32"),
        (fp8(fp8_param=True), {}, "model.fp8_param: weights kept in FP8 alone are not supported"),
        (fp8(fp8_recipe="delayed", first_last_layers_bf16=(1, 0)), {}, "not with fp8_recipe=delayed"),
        (fp8(first_last_layers_bf16=(3, 0)), {"pipeline": 2}, "at most the 2 layers of a pipeline stage"),
        (fp8(), {"tensor": 4}, "24 FFN channels of a tensor-parallel rank are no multiple of 16"),
        (fp8(fp8_recipe="mxfp8"), {"tensor": 2}, "48 FFN channels of a tensor-parallel rank are no multiple of 32"),
        (ModelConfig(path="", first_last_layers_bf16=(1, 1)), {}, "all layers are bfloat16 without model.fp8"),
        (emulated(spec="transformer_engine"), {}, "set model.spec=torch, not transformer_engine"),
        (emulated(spec="auto"), {}, "set model.spec=torch, not auto"),
        (emulated(first_last_layers_bf16=(3, 0)), {"pipeline": 2}, "at most the 2 layers of a pipeline stage"),
        (ModelConfig(path="", recompute="selective", recompute_modules=["moe"]), {}, "this one is dense: use mlp"),
        (
            ModelConfig(path="", recompute="selective", recompute_modules=["core_attn", "layernorm"]),
            {},
            "layernorm is for models with experts under Transformer Engine",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(config: ModelConfig, layout: dict, reason: str, architecture: Architecture) -> None:
    reasons = list(precision_errors(config, ParallelConfig(**layout), architecture))
    assert len(reasons) == 1 and reason in reasons[0]


def test_emulation_beside_fp8_is_refused(architecture: Architecture) -> None:
    first, *_ = precision_errors(emulated(fp8="hybrid", dtype="bfloat16"), ParallelConfig(), architecture)
    assert "model.fp8_emulation: not together with model.fp8" in first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_emulation_needs_no_gpu_and_no_sizes(dtype: Any, architecture: Architecture) -> None:
    """Blocks at the end of a dimension may be smaller."""
    config = emulated(dtype=dtype, first_last_layers_bf16=(1, 1))
    assert not list(precision_errors(config, ParallelConfig(tensor=4), architecture))
    assert runtime_error(config, "torch", torch.device("cpu")) is None
    assert "plain torch layers" in (runtime_error(config, "transformer_engine", torch.device("cuda")) or "")


def test_what_is_refused_of_a_model_with_experts(architecture: Architecture) -> None:
    experts = replace(architecture, num_experts=4, experts_per_token=2, expert_ffn_size=24)

    def reasons(**options: Any) -> list[str]:
        return list(precision_errors(fp8(recompute="selective", **options), ParallelConfig(), experts))

    assert "mlp is for dense models" in reasons(recompute_modules=["mlp"])[0]
    assert "24 expert channels of a rank" in reasons(recompute_modules=["moe"])[0]
    delayed = reasons(recompute_modules=["layernorm"], fp8_recipe="delayed")
    assert "layernorm cannot be recomputed with fp8_recipe=delayed" in delayed[0]


def test_a_recipe_is_told(architecture: Architecture, tmp_path: Path) -> None:
    tree = small_recipe(tmp_path, tmp_path / "run")
    tree["model"] |= {"fp8": "e4m3", "spec": "torch"}
    tree["optimizer"]["offload"] = 0.5
    tree["warmup"] = {"optimizer": {"offload": 1.0}}
    with pytest.raises(RecipeError) as error:
        check_recipe(parse_recipe(tree), architecture, 1)
    said = str(error.value)
    assert "model.fp8: needs model.spec" in said and "model.dtype=bfloat16" in said
    assert "\noptimizer.offload: on a CPU" in said and "warmup.optimizer.offload" in said


def test_the_teachers_sizes_are_looked_at_too(architecture: Architecture, tmp_path: Path) -> None:
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 40, "max_position_embeddings": 256}
    LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    tree = small_recipe(tmp_path, tmp_path / "run")
    tree["model"] |= {"fp8": "hybrid", "dtype": "bfloat16"}
    tree["objective"], tree["teacher"] = {"name": "opd"}, {"kind": "external", "path": str(tmp_path)}
    with pytest.raises(RecipeError, match=r"teacher\.path: 40 FFN channels .* no multiple of 16"):
        check_recipe(parse_recipe(tree), architecture, 1)


def test_a_recipe_is_warned(architecture: Architecture, tmp_path: Path) -> None:
    tree = small_recipe(tmp_path, tmp_path / "run")
    tree["model"] |= {"fp8": "hybrid", "dtype": "bfloat16"}
    longer = replace(architecture, max_positions=256)
    assert any("watch train/mismatch_k3" in line for line in check_recipe(parse_recipe(tree), longer, 1))
    tree["objective"]["surrogate"] = {"importance_cap": 2.0}
    assert not any("model.fp8" in line for line in check_recipe(parse_recipe(tree), longer, 1))


@pytest.mark.parametrize(
    ("quantised", "key"),
    [
        ({"model": {"spec": "torch", "fp8_emulation": "mxfp8"}}, "model.fp8_emulation"),
        (
            {"device": "cuda", "rollout": {"engine": "sglang", "sglang": {"servers": FP8_SERVERS}}},
            "rollout.sglang.servers.quantization",
        ),
    ],
    ids=["emulated", "servers"],
)
def test_a_recipe_whose_sides_round_differently_is_warned(
    quantised: dict[str, Any], key: str, architecture: Architecture, tmp_path: Path
) -> None:
    tree = small_recipe(tmp_path, tmp_path / "run")
    for section, values in quantised.items():
        tree[section] = tree[section] | values if isinstance(values, dict) else values
    tree["rollout"].pop("embedded")
    tree["model"]["dtype"] = "bfloat16"
    longer = replace(architecture, family="qwen2", max_positions=256)
    recipe = resolve(parse_recipe(tree), "bfloat16")
    assert [line for line in check_recipe(recipe, longer, 1) if line.startswith(f"{key}: trainer and engine round")]
    tree["objective"]["surrogate"] = {"importance_cap": 2.0}
    capped = check_recipe(resolve(parse_recipe(tree), "bfloat16"), longer, 1)
    assert not any("importance_cap nothing corrects" in line for line in capped)


def test_servers_that_could_not_take_new_weights_are_refused(architecture: Architecture, tmp_path: Path) -> None:
    tree = small_recipe(tmp_path, tmp_path / "run") | {"device": "cuda"}
    tree["rollout"] |= {"engine": "sglang", "sglang": {"servers": FP8_SERVERS}}
    longer = replace(architecture, max_positions=256)
    with pytest.raises(
        RecipeError, match=r"servers\.quantization: SGLang takes .* qwen2 and qwen3 only, not for llama"
    ):
        check_recipe(resolve(parse_recipe(tree), "bfloat16"), longer, 1)


def test_warnings_before_the_device_is_known() -> None:
    assert any("Blackwell" in line for line in precision_warnings(fp8(fp8_recipe="mxfp8")))
    assert any("one update old" in line for line in precision_warnings(fp8(fp8_recipe="delayed")))
    assert any("computed in float32" in line for line in precision_warnings(emulated()))
    assert not list(precision_warnings(fp8()))


@pytest.mark.parametrize(
    ("capability", "recipe", "runs"),
    [
        ((8, 0), "tensorwise", False),
        ((8, 9), "delayed", True),
        ((8, 9), "blockwise", False),
        ((9, 0), "blockwise", True),
        ((9, 0), "mxfp8", False),
        ((10, 0), "mxfp8", True),
        ((12, 0), "mxfp8", False),
    ],
)
def test_devices(capability: tuple[int, int], recipe: str, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Some GPU")
    reason = runtime_error(fp8(fp8_recipe=recipe), "transformer_engine", torch.device("cuda"))
    assert (reason is None) == runs
    assert runs or f"fp8_recipe={recipe} does not run on Some GPU" in reason


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (fp8(spec="auto"), r"model\.fp8 needs Transformer Engine on a GPU"),
        (ModelConfig(path="", recompute="selective", recompute_modules=["layernorm"]), "needs Transformer Engine, and"),
    ],
    ids=["fp8", "layernorm"],
)
def test_what_plain_layers_cannot(config: ModelConfig, reason: str, architecture: Architecture) -> None:
    context: Any = SimpleNamespace(layout=ParallelConfig(), device=torch.device("cpu"), world_size=1)
    with pytest.raises(ModelError, match=reason):
        build_model(architecture, context, config)


def test_rows_are_aligned(architecture: Architecture) -> None:
    """The alignment follows from the recipe's section, and from the Megatron configuration of a policy."""
    for config, step in ((ModelConfig(path="", dtype="bfloat16"), 1), (fp8(), 16), (fp8(fp8_recipe="mxfp8"), 32)):
        assert (
            alignment(config) == alignment(transformer_config(architecture, ParallelConfig(), config, "torch")) == step
        )


def test_megatron_is_told(architecture: Architecture) -> None:
    """Its own configuration takes FP8 also beside plain layers, where it checks what it can without the engine."""
    config = fp8(fp8_recipe="blockwise", first_last_layers_bf16=(1, 2))
    told = transformer_config(architecture, ParallelConfig(), config, "torch")
    assert (told.fp8, told.fp8_recipe, told.fp8_param) == ("hybrid", "blockwise", False)
    assert told.first_last_layers_bf16
    assert (told.num_layers_at_start_in_bf16, told.num_layers_at_end_in_bf16) == (1, 2)
    told = transformer_config(architecture, ParallelConfig(), ModelConfig(path="", dtype="bfloat16"), "torch")
    assert told.fp8 is None and told.recompute_granularity is None


@pytest.mark.parametrize(
    ("spec", "apex", "fused"),
    [
        ("transformer_engine", "whole", True),
        ("transformer_engine", "without fused gradients", False),
        ("transformer_engine", "absent", False),
        ("torch", "whole", False),
    ],
)
def test_fused_weight_gradients(
    spec: Any, apex: str, fused: bool, architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron_config, "installed_apex", lambda: apex)
    monkeypatch.setattr(megatron_config, "TransformerConfig", lambda **settings: SimpleNamespace(**settings))
    told = transformer_config(architecture, ParallelConfig(), ModelConfig(path="", dtype="bfloat16"), spec)
    assert told.gradient_accumulation_fusion == fused


def test_old_words_for_recompute() -> None:
    assert ModelConfig(path="", recompute=True).recompute == "full"
    assert ModelConfig(path="", recompute=False).recompute == "none"


def test_the_other_apex_breaks_nothing(tmp_path: Path) -> None:
    """PyPI's package of that name can be imported; Megatron takes what it can import for NVIDIA's."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    path = make_checkpoint("llama", tmp_path)
    code = (
        "import apex; from pathlib import Path; from tiny_policy import *\n"
        "with joined() as context:\n"
        f"    policy = build_policy(Path({str(path)!r}), context, optimizer=OPTIMIZER)\n"
        "    print(policy.update(make_examples(), SPEC)['train/grad_norm'] > 0)\n"
    )
    folders = [str(tmp_path), *sys.path]
    command = [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path[:0] = {folders!r}\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "True", done.stderr
