"""`check`: what it shows, and recipes for machines other than this one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import results_of, run_command, run_world
from recipes import ROOT, Tree

from megatron_hdpo import cli

RECIPE_7B = ROOT / "examples" / "qwen2.5-7b" / "hdpo.yaml"
CONFIG_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}


def test_check_shows_the_prompts_and_writes_nothing(tree: Tree, write_recipe: Callable[[Tree], Path]) -> None:
    ended = run_command("check", write_recipe(tree), "rollout.samples_per_prompt=1")
    results_of(ended)
    out = ended.stdout[0]
    assert "sums: 40 problems" in out and "held_out: 4 problems" in out
    assert "warning: rollout.samples_per_prompt=1: a group of one has advantage 0" in out
    question = out.partition("first prompt (sums/0):\n")[2].splitlines()[0]
    privileged = out.partition("first privileged prompt:\n")[2].splitlines()[0]
    assert question.endswith("=") and privileged.endswith("#" + question)
    assert out.endswith("the recipe is fine\n")
    assert not Path(tree["output"]).exists()


def test_check_takes_the_layouts_own_number_of_ranks(tree: Tree, write_recipe: Callable[[Tree], Path]) -> None:
    """Without torchrun `check` checks a recipe for eight GPUs on a laptop."""
    path = write_recipe(tree | {"parallel": {"tensor": 2, "pipeline": 2}})
    results_of(run_world(1, check_without_torchrun, str(path)))


def check_without_torchrun(recipe: str) -> None:
    for name in [name for name in os.environ if name in ("RANK", "WORLD_SIZE") or name.startswith("TORCHELASTIC")]:
        del os.environ[name]
    cli.main(["check", recipe])


def test_check_refuses_an_output_that_is_a_file(
    tree: Tree, write_recipe: Callable[[Tree], Path], tmp_path: Path
) -> None:
    (tmp_path / "taken").touch()
    ended = run_command("check", write_recipe(tree), f"output={tmp_path / 'taken'}")
    assert ended.codes == [2]
    assert ended.stderr[0] == f"RecipeError: output: {tmp_path / 'taken'} is a file: name a folder\n"


def cut(model: Path) -> None:
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1000])


def empty(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def other_shape(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, "WeightsError: {model}/model.safetensors cannot be read ("),
        (empty, "WeightsError: {model}/model.safetensors cannot be read ("),
        (other_shape, "WeightsError: {model} does not hold the llama of its config.json\n"),
    ],
)
def test_check_reads_the_headers_of_the_weights(
    damage: Callable[[Path], None],
    says: str,
    tree: Tree,
    write_recipe: Callable[[Tree], Path],
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tree["model"]["path"], model)
    damage(model)
    ended = run_command("check", write_recipe(tree), f"model.path={model}")
    assert ended.codes == [2] and ended.stderr[0].startswith(says.replace("{model}", str(model)))
    assert ended.stderr[0].count("\n") <= 10 and "Traceback" not in ended.stderr[0]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("health.min_free_disk_gb=1e9", "RecipeError: output: {folder} has "),
        ("output={folder}/recipe.yaml/run", "RecipeError: output: {folder}/recipe.yaml is a file: name a folder\n"),
        ("rollout.replay={folder}/recipe.yaml", "RecipeError: rollout.replay: there is no folder {folder}/recipe.yaml"),
        (
            "rollout.replay={folder}",
            "DataError: rollout.replay: {folder} has no rollouts of step 1, and train.steps is",
        ),
        ("rollout.engine=sglang", "RecipeError: rollout.sglang.servers: SGLang servers: "),
        ("rollout.prompts_per_step=41", "DataError: task 'sums': a step takes 41 of its 40 problems, and copies of a "),
        ("data.evaluation.0.name='held out'", "RecipeError: data.evaluation.0.name: 'held out' cannot be part of a "),
        ("rollout.embedded.max_batch_tokens=39", "RecipeError: rollout.embedded.max_batch_tokens: 39 cannot hold one "),
        (
            "parallel.virtual_stages=2",
            "RecipeError: parallel.virtual_stages: only the stages of a pipeline can be cut ",
        ),
    ],
)
def test_check_refuses_what_train_would(
    override: str, says: str, tree: Tree, write_recipe: Callable[[Tree], Path], tmp_path: Path
) -> None:
    ended = run_command("check", write_recipe(tree), override.replace("{folder}", str(tmp_path)))
    assert ended.codes == [2] and ended.stderr[0].startswith(says.replace("{folder}", str(tmp_path))), ended.text
    assert ended.stderr[0].count("\n") == 1


@pytest.fixture
def shipped_7b(tiny_model: Path, tmp_path: Path) -> list[str]:
    """The arguments to check the shipped recipe of 7B: its model's shape, problems and a tokenizer that are here."""
    model = tmp_path / "7b"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("*.safetensors", "generation_config.json"))
    (model / "config.json").write_text(json.dumps(CONFIG_7B))
    tasks = "[{kind: digit_sums, name: sums, lengths: [4], size: 256}]"
    data = [f"data.train={tasks}", "data.evaluation=[]", "data.prompts.chat=false"]
    return [str(RECIPE_7B), f"model.path={model}", f"output={tmp_path / 'run'}", *data]


def test_the_shipped_7b_recipe_passes_for_gpus_on_a_machine_without(shipped_7b: list[str]) -> None:
    ended = run_command("check", *shipped_7b, "--for", "gpu", "--ranks", 16)
    results_of(ended)
    lines = ended.stdout[0].splitlines()
    assert lines[:2] == ["precision: bfloat16 (model.dtype=bfloat16)", "ranks: 16"]
    assert "not checked: device=cuda: this machine has no GPU" in lines
    assert "not checked: model.spec=auto: Transformer Engine is not installed here" in lines
    assert any(line.startswith("not checked: rollout.sglang.servers: ") for line in lines)
    assert lines[-1] == "the recipe is fine" and not any(line.startswith("warning: ") for line in lines)


def test_without_for_gpu_the_error_names_it(shipped_7b: list[str]) -> None:
    ended = run_command("check", *shipped_7b)
    assert ended.codes == [2]
    assert "memory_saver" in ended.stderr[0] and "check --for gpu" in ended.stderr[0].splitlines()[-1]


def test_for_gpu_finds_what_is_wrong_on_gpus_too(shipped_7b: list[str]) -> None:
    ended = run_command("check", *shipped_7b, "--for", "gpu", "--ranks", 3)
    assert ended.codes == [2] and ended.stderr[0].startswith("RecipeError: parallel: ")


def test_optimizer_offload_is_allowed_for_gpus_without_transformer_engine_here(shipped_7b: list[str]) -> None:
    offload = "optimizer.offload=0.5"
    results_of(run_command("check", *shipped_7b, offload, "--for", "gpu", "--ranks", 2))
    ended = run_command("check", *shipped_7b, offload, "device=cuda", "--ranks", 2)
    assert ended.codes == [2] and "needs Transformer Engine" in ended.stderr[0]


def test_a_recipe_for_cuda_is_warned_about_here(shipped_7b: list[str]) -> None:
    ended = run_command("check", *shipped_7b, "device=cuda", "--ranks", 2)
    results_of(ended)
    warnings = [line for line in ended.stdout[0].splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 4 and all(line.endswith("check --for gpu") for line in warnings)


def test_for_names_no_device_that_the_recipe_excludes(tree: Tree, write_recipe: Callable[[Tree], Path]) -> None:
    ended = run_command("check", write_recipe(tree), "--for", "gpu")
    says = "RecipeError: device: cpu, so --for gpu does not apply: leave it out, or set device=auto\n"
    assert (ended.codes, ended.stderr) == ([2], [says])
