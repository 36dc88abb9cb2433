"""Every wrong input gets one clear message on one rank, exit code 2, no traceback, and changes nothing on disk."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Ended, results_of, run_command, run_world
from recipes import make_model, small_recipe

from megatron_hdpo.environment import absent

Tree = dict[str, Any]
Edit = Callable[[Tree, Path], None]


@dataclass(frozen=True)
class Wrong:
    """One wrong input. edit: changes the recipe's tree, may write files into the folder. text: in place of the recipe.
    says: all that reaches stderr, with {recipe}, {folder} and {cwd} for the paths of the case."""

    name: str
    says: str
    overrides: Sequence[str] = ()
    edit: Edit | None = None
    text: str | None = None
    ranks: int = 1


def put(path: str, value: Any) -> Edit:
    """An edit that sets `key.path`; list positions are numbers."""

    def edit(tree: Tree, folder: Path) -> None:
        *parents, last = path.split(".")
        _section(tree, parents)[last] = value

    return edit


def without(path: str) -> Edit:
    """An edit that removes `key.path`."""

    def edit(tree: Tree, folder: Path) -> None:
        *parents, last = path.split(".")
        del _section(tree, parents)[last]

    return edit


def rows(*lines: str, **keys: Any) -> Edit:
    """An edit that trains on a JSON-lines file of these lines."""

    def edit(tree: Tree, folder: Path) -> None:
        (folder / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
        tree["data"]["train"] = [{"kind": "jsonl", "path": str(folder / "rows.jsonl"), **keys}]
        tree["data"]["cache_dir"] = str(folder / "cache")

    return edit


def task(**keys: Any) -> Edit:
    """An edit that trains on one task of these keys."""
    return put("data.train", [keys])


def model(config: dict[str, Any] | None = None, remove: str | None = None) -> Edit:
    """An edit that trains another tiny model, some keys of its config.json changed, some of its files removed."""

    def edit(tree: Tree, folder: Path) -> None:
        path = make_model(folder / "other-model")
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
        for unwanted in path.glob(remove) if remove else ():
            unwanted.unlink()
        tree["model"]["path"] = str(path)

    return edit


def files(contents: dict[str, str]) -> Edit:
    """An edit that writes files into the folder of the case."""

    def edit(tree: Tree, folder: Path) -> None:
        for name, text in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    return edit


def _section(tree: Any, parents: Sequence[str]) -> Any:
    for part in parents:
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


GOOD_ROW = '{"problem": "1+1=", "answer": "2"}'

FAILS_AFTER_THE_BEGINNING = {"warm-up without solutions", "replay of a broken file"}
LEFT_BY_A_BEGUN_RUN = {"run/recipe.yaml", "run/metrics.jsonl"}

TABLE = [
    Wrong(
        "unknown top-level key",
        "RecipeError: {override}: trian: unknown key; did you mean train?",
        ["trian.steps=3"],
    ),
    Wrong(
        "unknown nested key",
        "RecipeError: {override}: train.step: unknown key; did you mean steps?",
        ["train.step=3"],
    ),
    Wrong(
        "unknown key in a union",
        "RecipeError: {override}: objective.distil: unknown key; did you mean distill?",
        ["objective.distil.top_k=3"],
    ),
    Wrong(
        "unknown key deep in a union",
        "RecipeError: {override}: objective.distill.topk: unknown key; did you mean top_k?",
        ["objective.distill.topk=3"],
    ),
    Wrong(
        "unknown key in a list's union",
        "RecipeError: {override}: data.train.0.length: unknown key; did you mean lengths?",
        ["data.train.0.length=[2]"],
    ),
    Wrong(
        "unknown key with nothing like it",
        "RecipeError: {override}: parallel.zzz: unknown key; known keys: tensor, pipeline, virtual_stages, context, "
        "expert, expert_tensor, sequence, overlap, timeout_minutes, silence_minutes, phase_minutes",
        ["parallel.zzz=2"],
    ),
    Wrong(
        "missing section",
        "RecipeError: {recipe}: model: required key is missing",
        edit=without("model"),
    ),
    Wrong(
        "missing nested key",
        "RecipeError: {recipe}: model.path: required key is missing",
        edit=without("model.path"),
    ),
    Wrong(
        "missing key in a list's union",
        "RecipeError: {recipe}: data.train.0.lengths: required key is missing",
        edit=without("data.train.0.lengths"),
    ),
    Wrong(
        "missing tag of a union",
        "RecipeError: {recipe}: data.train.0.kind: required key is missing, one of digit_sums, "
        "knights_knaves, letter_choice, reasoning_gym, jsonl, json, csv, parquet, huggingface",
        edit=without("data.train.0.kind"),
    ),
    Wrong(
        "unknown tag of a union",
        "RecipeError: {override}: objective.name: ppo is not one of grpo, hdpo, opd, vopd, akl, opsd, "
        "sdpo, srpo, rlsd, rlcsd, contrastive_opsd, paced; a class of your own is module:Name or path/to/file.py:Name",
        ["objective.name=ppo"],
    ),
    Wrong(
        "a class in a file that is not there",
        "RecipeError: {override}: objective.name: there is no file no-such-lab/mine.py in the working directory {cwd}",
        ["objective.name=no-such-lab/mine.py:Mine"],
    ),
    Wrong(
        "wrong type",
        "RecipeError: {override}: train.steps: Input should be a valid integer, unable to parse string as "
        "an integer (given: 'many')",
        ["train.steps=many"],
    ),
    Wrong(
        "wrong type in a list's union",
        "RecipeError: {override}: data.train.0.size: Input should be a valid integer, unable to parse "
        "string as an integer (given: 'big')",
        ["data.train.0.size=big"],
    ),
    Wrong(
        "fraction for a whole number",
        "RecipeError: {override}: train.steps: Input should be a valid integer, got a number with a "
        "fractional part (given: 2.5)",
        ["train.steps=2.5"],
    ),
    Wrong(
        "section for a value",
        "RecipeError: override 'train.steps.max=2': train.steps is a value, not a section",
        ["train.steps.max=2"],
    ),
    Wrong(
        "value for a section",
        "RecipeError: {override}: train: must be a section with keys of its own (given: 2)",
        ["train=2"],
    ),
    Wrong(
        "out of range",
        "RecipeError: {override}: rollout.temperature: Input should be greater than 0 (given: 0)",
        ["rollout.temperature=0"],
    ),
    Wrong(
        "not one of the choices",
        "RecipeError: {override}: device: Input should be 'auto', 'cuda' or 'cpu' (given: 'tpu')",
        ["device=tpu"],
    ),
    Wrong(
        "several errors at once",
        "RecipeError: override 'rollout.top_p=2': rollout.top_p: Input should be less than or equal to 1 (given: 2)\n"
        "override 'train.steps=-1': train.steps: Input should be greater than or equal to 0 (given: -1)\n"
        "override 'modle=1': modle: unknown key; did you mean model?",
        ["train.steps=-1", "rollout.top_p=2", "modle=1"],
    ),
    Wrong(
        "override without =",
        "RecipeError: override 'train.steps': write key.path=value",
        ["train.steps"],
    ),
    Wrong(
        "override without a key",
        "RecipeError: override '=3': write key.path=value",
        ["=3"],
    ),
    Wrong(
        "override below a value",
        "RecipeError: {override}: seed: Input should be a valid integer (given: a section)",
        ["seed.x.y=1"],
    ),
    Wrong(
        "override below a value, last",
        "RecipeError: {override}: seed: Input should be a valid integer (given: a section)",
        ["seed.x=1"],
    ),
    Wrong(
        "override beyond a list",
        "RecipeError: override 'data.train.3.size=5': data.train.3: the list has items 0 to 0",
        ["data.train.3.size=5"],
    ),
    Wrong(
        "override with a name for a list position",
        "RecipeError: override 'data.train.first.size=5': data.train.first: the list has items 0 to 0",
        ["data.train.first.size=5"],
    ),
    Wrong(
        "override that is not YAML",
        "RecipeError: override 'model.path=[1, 2': the value is not YAML: line 1, column 6: expected ','"
        " or ']', but got '<stream end>'",
        ["model.path=[1, 2"],
    ),
    Wrong(
        "bad YAML",
        "RecipeError: {recipe}: is not YAML: line 2, column 5: expected ',' or ']', but got ':'",
        text="output: [1, 2\nseed: 3\n",
    ),
    Wrong(
        "not a mapping",
        "RecipeError: {recipe}: must be a mapping of sections, not a list",
        text="- 1\n- 2\n",
    ),
    Wrong(
        "empty file",
        "RecipeError: {recipe}: must be a mapping of sections, not nothing (is the file empty?)",
        text="",
    ),
    Wrong(
        "not text",
        "RecipeError: {recipe}: is not YAML: unacceptable character #x0000: special characters are not "
        'allowed in "<unicode string>", position 0',
        text="\x00\x01",
    ),
    Wrong(
        "no recipe file",
        "RecipeError: {recipe}: cannot be read: No such file or directory",
        text="(none)",
    ),
    Wrong(
        "evaluation k > n",
        "RecipeError: {recipe}: evaluation: k=[4] cannot be estimated from samples=2: each k must be 1..samples",
        ["evaluation.k=[1,4]"],
    ),
    Wrong(
        "template with an unknown variable",
        "RecipeError: {recipe}: data.prompts.student: the template uses unknown variables: anser; it may"
        " use: question (given: '{{ question }} {{ anser }}')",
        edit=put("data.prompts.student", "{{ question }} {{ anser }}"),
    ),
    Wrong(
        "template without the question",
        "RecipeError: {recipe}: data.prompts.student: the template does not use the variable question, "
        "so every prompt would be the same (given: 'solve it')",
        edit=put("data.prompts.student", "solve it"),
    ),
    Wrong(
        "template file that is not there",
        "RecipeError: {override}: data.prompts.student: cannot read the file missing.jinja: No such file or "
        "directory (relative to {cwd}) (given: 'missing.jinja')",
        ["data.prompts.student=missing.jinja"],
    ),
    Wrong(
        "file of the system message that is not there",
        "RecipeError: {override}: data.prompts.system: cannot read the file system.txt: No such file or "
        "directory (relative to {cwd}) (given: 'system.txt')",
        ["data.prompts.system=system.txt"],
    ),
    Wrong(
        "two tasks of one name",
        "RecipeError: {recipe}: data: several tasks are called sums: give each its own `name`",
        edit=put("data.evaluation.0.name", "sums"),
    ),
    Wrong(
        "no training task",
        "RecipeError: {override}: data.train: List should have at least 1 item after validation, not 0 (given: a list)",
        ["data.train=[]"],
    ),
    Wrong(
        "no such model folder",
        "ArchitectureError: {folder}/nowhere/config.json does not exist: model.path must be a Hugging "
        "Face checkpoint folder, or a model of the hub that `megatron_hdpo prepare` has downloaded",
        ["model.path={folder}/nowhere"],
    ),
    Wrong(
        "model folder without weights",
        "WeightsError: {folder}/other-model holds neither model.safetensors nor "
        "model.safetensors.index.json: no weights to read",
        edit=model(remove="model.safetensors"),
    ),
    Wrong(
        "unsupported architecture",
        "ArchitectureError: {folder}/other-model/config.json: architectures=GPT2LMHeadModel is not "
        "supported; supported: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM",
        edit=model({"architectures": ["GPT2LMHeadModel"]}),
    ),
    Wrong(
        "model folder without tokenizer",
        "ModelError: model.path: {folder}/other-model holds no tokenizer that transformers can load: "
        "Couldn't instantiate the backend tokenizer from one of: (1) a `tokenizers` library serialization file, "
        "(2) a slow tokenizer instance to convert or (3) an equivalent slow tokenizer class to instantiate and "
        "convert. You need to have sentencepiece or tiktoken installed to convert a slow tokenizer to a fast one.",
        edit=model(remove="token*"),
    ),
    Wrong(
        "heads not divisible by TP",
        "RecipeError: parallel: parallel.tensor=3 does not divide the model's 4 attention heads; "
        "parallel.tensor=3 does not divide the model's 2 key-value heads; parallel.tensor=3 does not "
        "divide the model's 64 FFN channels",
        ["parallel.tensor=3"],
        ranks=3,
    ),
    Wrong(
        "layers not divisible by PP",
        "RecipeError: parallel: parallel.pipeline=3 does not divide the model's 2 layers",
        ["parallel.pipeline=3"],
        ranks=3,
    ),
    Wrong(
        "world size no multiple",
        "LayoutError: 1 ranks are no multiple of parallel.tensor x parallel.context x parallel.pipeline = 2 x 1 x 1: "
        "start a multiple of 2",
        ["parallel.tensor=2"],
    ),
    Wrong(
        "sequence parallel without TP",
        "RecipeError: parallel: parallel.sequence=true needs parallel.tensor > 1",
        ["parallel.sequence=true"],
    ),
    Wrong(
        "cuda without a GPU",
        "LayoutError: device=cuda, but torch sees no GPU on this machine: set device=cpu or device=auto",
        ["device=cuda"],
    ),
    Wrong(
        "transformer engine on a CPU",
        "ModelError: model.spec=transformer_engine needs a GPU and the transformer-engine package: use spec=torch",
        ["model.spec=transformer_engine"],
    ),
    Wrong(
        "k > vocabulary",
        "RecipeError: objective.distill.top_k: 18 exceeds the vocabulary of 16 tokens",
        ["objective.distill.top_k=18"],
    ),
    Wrong(
        "prompt + response > context",
        "RecipeError: data.prompts.max_privileged_tokens: 32 + rollout.max_new_tokens 100 exceed the "
        "context of 128 tokens",
        ["rollout.max_new_tokens=100"],
    ),
    Wrong(
        "evaluation response > context",
        "RecipeError: evaluation.max_new_tokens: 113 does not fit the context of 128 tokens",
        ["evaluation.max_new_tokens=113"],
    ),
    Wrong(
        "max_sequence > positions",
        "RecipeError: model.max_sequence: 129 is beyond the model's 128 positions",
        ["model.max_sequence=129"],
    ),
    Wrong(
        "micro-batch too small",
        "RecipeError: train.micro_batch_tokens: 39 cannot hold one sequence of "
        "data.prompts.max_privileged_tokens 32 + rollout.max_new_tokens 8",
        ["train.micro_batch_tokens=39"],
    ),
    Wrong(
        "reverse KL with a cut tail",
        "RecipeError: objective.distill.kind: reverse_kl is infinite where the teacher is cut to zero; "
        "set objective.distill.tail=bucket",
        ["objective.distill.kind=reverse_kl"],
    ),
    Wrong(
        "literal tail with another kind",
        "RecipeError: objective.distill.tail: literal is defined for kind=jsd only, not forward_kl",
        ["objective.distill.tail=literal"],
    ),
    Wrong(
        "engine's logits with a frozen teacher",
        "RecipeError: objective.logits_from: rollout gives the policy's logits, but teacher.kind is frozen",
        ["objective.logits_from=rollout", "teacher.kind=frozen"],
    ),
    Wrong(
        "engine's logits at another temperature",
        "RecipeError: objective.logits_from: the engine's log-probs are at rollout.temperature 0.7, "
        "objective.distill.temperature is 1.0: make them equal or set logits_from=trainer",
        ["objective.logits_from=rollout", "rollout.temperature=0.7"],
    ),
    Wrong(
        "teacher without a use",
        "RecipeError: teacher.kind: frozen, but objective grpo has no teacher",
        ["teacher.kind=frozen"],
        edit=put("objective", {"name": "grpo"}),
    ),
    Wrong(
        "nothing left: prompts too long",
        "DataError: task 'sums' has no problem left (sums: 0 problems; sums: 40 left out, prompt too "
        "long (first: sums/0: the prompt has 4 tokens, max_prompt_tokens is 2))",
        ["data.prompts.max_prompt_tokens=2"],
    ),
    Wrong(
        "nothing left: filter",
        "DataError: task 'rows': no problem is left of {folder}/rows.jsonl; check filter and limit",
        edit=rows(GOOD_ROW[:-1] + ', "level": 1}', filter={"level": [9]}),
    ),
    Wrong(
        "unparseable gold",
        "DataError: {folder}/rows.jsonl:2: gold answer '\\\\frac{1}{' is not an expression that can be "
        "read as a whole; correct the row, or set on_bad_row: drop for task 'rows'",
        edit=rows(GOOD_ROW, '{"problem": "1+2=", "answer": "\\\\frac{1}{"}'),
    ),
    Wrong(
        "broken JSON line",
        "DataError: {folder}/rows.jsonl:2: not JSON: Expecting property name enclosed in double quotes "
        "at column 1; correct the row, or set on_bad_row: drop for task 'rows'",
        edit=rows(GOOD_ROW, '{"problem": "1+2=", '),
    ),
    Wrong(
        "missing key in a row",
        "DataError: {folder}/rows.jsonl:2: has no key 'problem' (it has: answer, question); correct the "
        "row, or set on_bad_row: drop for task 'rows'",
        edit=rows(GOOD_ROW, '{"question": "1+2=", "answer": "3"}'),
    ),
    Wrong(
        "no data file",
        "DataError: task 'nowhere': nowhere.jsonl does not exist; path must name a file (relative to {cwd})",
        edit=task(kind="jsonl", path="nowhere.jsonl"),
    ),
    Wrong(
        "unknown reasoning-gym set",
        "DataError: task 'chain_sun': reasoning-gym has no set 'chain_sun'; did you mean chain_sum or "
        "decimal_chain_sum?",
        edit=task(kind="reasoning_gym", dataset="chain_sun"),
    ),
    Wrong(
        "reasoning-gym parameter",
        "DataError: task 'chain_sum': reasoning-gym's chain_sum refuses the parameters {'zzz': 1}: "
        "ChainSumConfig.__init__() got an unexpected keyword argument 'zzz'",
        edit=task(kind="reasoning_gym", dataset="chain_sum", parameters={"zzz": 1}),
    ),
    Wrong(
        "too few different problems",
        "DataError: task 'sums': too few different sums of 2 digits for size 5000; lower size or use longer lengths",
        ["data.train.0.size=5000"],
    ),
    Wrong(
        "text without tokens",
        "NoTokenForText: the tokenizer has no token for some characters of this prompt: 'Solve 6+5='",
        edit=put("data.prompts.student", "Solve {{ question }}"),
    ),
    Wrong(
        "chat without a chat template",
        "DataError: data.prompts.chat is true, but the tokenizer has no chat template; set it to false",
        ["data.prompts.chat=true"],
    ),
    Wrong(
        "replay folder that is not there",
        "RecipeError: rollout.replay: there is no folder {folder}/nowhere: name the rollouts folder of a run",
        ["rollout.replay={folder}/nowhere"],
    ),
    Wrong(
        "replay without the step's file",
        "DataError: rollout.replay: {folder}/replay has no rollouts of step 1, and train.steps is 2: "
        "name the rollouts folder of a run with at least as many steps",
        ["rollout.replay={folder}/replay"],
        edit=files({"replay/step_00000002.jsonl": ""}),
    ),
    Wrong(
        "replay of a broken file",
        "DataError: rollout.replay: {folder}/replay/step_00000001.jsonl:1: broken line, the file ends here (a "
        "writer that was stopped?): Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ["rollout.replay={folder}/replay", "train.steps=1"],
        edit=files({"replay/step_00000001.jsonl": "{"}),
    ),
    Wrong(
        "warm-up without solutions",
        "DataError: warmup on data.train: none of 1 problems has a worked solution of at most 8 tokens",
        [
            "rollout.prompts_per_step=1",
            "warmup.kind=sft",
            'data.prompts.privileged="{{ solution or answer }}#{{ question }}"',
        ],
        edit=rows(GOOD_ROW),
    ),
    Wrong(
        "a privileged prompt with nothing to show",
        "NoGroundTruthError: rows/1: data.prompts.privileged shows `solution` or `answer`, and this problem has none "
        "to show; write {{ solution or answer }}, or put it inside {% if solution %}",
        edit=rows(GOOD_ROW),
    ),
    Wrong(
        "a privileged prompt without the ground truth",
        "RecipeError: {override}: data.prompts.privileged: the template uses neither answer nor solution: its teacher "
        "would know no more than the student (given: '{{ question }}')",
        ['data.prompts.privileged="{{ question }}"'],
    ),
    Wrong(
        "a learning rate that is not finite",
        "RecipeError: {override}: optimizer.lr: Input should be a finite number (given: inf)",
        ["optimizer.lr=.inf"],
    ),
    Wrong(
        "output is a file",
        "RecipeError: output: {folder}/run is a file: name a folder",
        edit=files({"run": ""}),
    ),
    Wrong(
        "damaged metrics.jsonl",
        "MetricsFileError: {folder}/run/metrics.jsonl, line 1: not JSON (Expecting property name "
        "enclosed in double quotes: line 2 column 1 (char 2)); remove or repair the line",
        edit=files({"run/metrics.jsonl": "{\n"}),
    ),
    Wrong(
        "key given twice",
        "RecipeError: {recipe}: is not YAML: line 2, column 1: the key seed is given twice",
        text="seed: 1\nseed: 2\n",
    ),
    Wrong(
        "tag in the wrong place",
        "RecipeError: {override}: objective.hdpo: unknown key; known keys: name, cliff_threshold, advantage, overlong, "
        "overlong_penalty, aggregation, surrogate, kl, privileged, distill, logits_from",
        ["objective.hdpo.distill.top_k=3"],
    ),
    Wrong(
        "two ranks, data",
        "DataError: task 'sums': too few different sums of 2 digits for size 5000; lower size or use longer lengths",
        ["data.train.0.size=5000"],
        ranks=2,
    ),
]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_message(case: Wrong, tree: Tree, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    if case.edit:
        case.edit(tree, tmp_path)
    if case.text != "(none)":
        recipe.write_text(yaml.safe_dump(tree) if case.text is None else case.text)
    before = contents(tmp_path)
    overrides = [text.replace("{folder}", str(tmp_path)) for text in case.overrides]
    ended = run_command("train", recipe, *overrides, ranks=case.ranks)
    says = case.says.replace("{override}", f"override '{overrides[0]}'" if overrides else "")
    check_refused(ended, says, {"{recipe}": recipe, "{folder}": tmp_path, "{cwd}": Path.cwd()})
    changed = {name for name, _ in contents(tmp_path).items() ^ before.items()}
    assert changed <= (LEFT_BY_A_BEGUN_RUN if case.name in FAILS_AFTER_THE_BEGINNING else set())


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below the folder; logs, caches, TensorBoard's events and the empty lock left out."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not {"logs", "cache", "tensorboard", "run.lock"} & set(path.relative_to(folder).parts)
    }


def check_refused(ended: Ended, says: str, paths: dict[str, Path]) -> None:
    """All ranks ended with 2, and all that they wrote to stderr together is `says`, once."""
    heard = re.sub(r"(recipe\.yaml):\d+:", r"\1:", "".join(ended.stderr))  # lines: tests/config/test_wrong_recipes.py
    for name, path in paths.items():
        says = says.replace(name, str(path))
    assert heard == says + "\n", ended.text
    assert "Traceback" not in ended.text
    assert ended.codes == [2] * len(ended.codes), ended.text


SECRET = "s3cr3t-value"


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with a frozen teacher, and a secret in its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = small_recipe(tiny_model, folder / "run")
    recipe["teacher"] = {"kind": "frozen"}
    recipe["tracking"] = {"tensorboard": True}
    recipe["rollout"]["sglang"] = {"servers": {"environment": {"HF_TOKEN": SECRET}}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    results_of(run_command("train", folder / "recipe.yaml"))
    return folder


def test_no_file_of_a_run_holds_a_secret(finished: Path) -> None:
    files = [path for path in (finished / "run").rglob("*") if path.is_file()]
    assert {"recipe.yaml", "report.html"} <= {path.name for path in files}
    assert any("tensorboard" in path.parts for path in files)
    for path in files:
        data = path.read_bytes()
        assert SECRET.encode() not in (gzip.decompress(data) if path.suffix == ".gz" else data), path


CHECKPOINT = "{folder}/run/checkpoints/step_00000002"
RESUMED = [
    Wrong(
        "checkpoint of another layout",
        f"CheckpointError: {CHECKPOINT} was written at tensor=1 (parallel section), this run has tensor=2: the "
        "optimizer's state cannot change its layout. Start a new run from the exported Hugging Face checkpoint, or "
        "write a checkpoint with checkpoint.reshardable=true there",
        ["parallel.tensor=2"],
        ranks=2,
    ),
    Wrong(
        "checkpoint of another model",
        f"CheckpointError: {CHECKPOINT} is of another model: hidden_size is 32 there and 64 here; train into another "
        "output folder",
        ["model.path={folder}/wider"],
        edit=lambda tree, folder: make_model(folder / "wider", hidden=64),
    ),
    Wrong(
        "checkpoint without its state",
        f"CheckpointError: {CHECKPOINT}/run_state.json cannot be read ([Errno 2] No such file or directory: "
        f"'{CHECKPOINT}/run_state.json'): delete {CHECKPOINT} to resume an older one",
        # With its manifest it would be set aside as damaged.
        edit=lambda tree, folder: [
            (folder / "run/checkpoints/step_00000002" / name).unlink() for name in ("run_state.json", "manifest.json")
        ],
    ),
    Wrong(
        "frozen teacher gone",
        "CheckpointError: {folder}/run/checkpoints/teacher is missing: a run with a frozen teacher or a KL penalty "
        "cannot be resumed without it",
        edit=lambda tree, folder: shutil.rmtree(folder / "run/checkpoints/teacher"),
    ),
    Wrong(
        "replay of fewer steps than are left",
        "DataError: rollout.replay: {folder}/run/rollouts has no rollouts of step 3, and train.steps is 3: name the "
        "rollouts folder of a run with at least as many steps",
        ["rollout.replay={folder}/run/rollouts", "train.steps=3"],
    ),
]


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: case.name)
def test_a_refused_recipe_leaves_the_run_as_it_was(case: Wrong, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    recipe = tmp_path / "recipe.yaml"
    tree = yaml.safe_load(recipe.read_text()) | {"output": str(tmp_path / "run")}
    if case.edit:
        case.edit(tree, tmp_path)
    recipe.write_text(yaml.safe_dump(tree))
    before = contents(tmp_path)
    ended = run_command(
        "train", recipe, *[text.replace("{folder}", str(tmp_path)) for text in case.overrides], ranks=case.ranks
    )
    check_refused(ended, case.says, {"{folder}": tmp_path})
    assert contents(tmp_path) == before


def without_package(package: str, recipe: str, *overrides: str) -> None:
    sys.modules[package] = None  # type: ignore[assignment]  # what Python itself takes for "cannot be imported"
    from megatron_hdpo.cli import main

    main(["train", recipe, *overrides])


@pytest.mark.parametrize(
    ("package", "override"), [("wandb", "tracking.wandb.project=p"), ("mlflow", "tracking.mlflow.uri=u")]
)
def test_a_tracker_that_is_not_installed(
    package: str, override: str, tree: Tree, write_recipe: Callable[[Tree], Path]
) -> None:
    ended = run_world(2, without_package, package, str(write_recipe(tree)), override)
    says = f"RecipeError: tracking.{package}: {absent(package)}\n"
    assert "".join(ended.stderr) == says
    assert ended.codes[0] == 2
    assert not (Path(tree["output"]) / "metrics.jsonl").exists()


def fails_alone(rank: int, folder: str) -> None:
    """One rank only cannot read what all others can."""
    from megatron_hdpo import cli, commands
    from megatron_hdpo.weights.errors import WeightsError

    def alone(arguments: Any) -> None:
        if int(os.environ["RANK"]) == rank:
            raise WeightsError("the disk of this machine lacks a file")
        time.sleep(600)

    commands.ALL = (replace(commands.check.COMMAND, run=alone),)
    cli.main(["check", folder])


def test_an_error_of_one_rank_alone_is_heard(tmp_path: Path) -> None:
    ended = run_world(2, fails_alone, 1, str(tmp_path), grace=1)
    assert ended.stderr == ["", "WeightsError: the disk of this machine lacks a file\n"]
    assert ended.codes[1] == 2
