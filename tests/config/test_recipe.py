"""The recipe: overrides, round trip, descriptions of all keys, the examples."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from recipes import ROOT, Tree, make_model

from megatron_hdpo.config import (
    Recipe,
    RecipeError,
    check_recipe,
    check_sections,
    load_recipe,
    parse_recipe,
    save_recipe,
)
from megatron_hdpo.config.file import apply_override
from megatron_hdpo.model.architecture import Architecture, read_architecture
from megatron_hdpo.teachers.sizes import check_sizes


def test_saved_recipe_reads_back_equal(tree: Tree, tmp_path: Path) -> None:
    tree["data"]["train"].append({"kind": "reasoning_gym", "dataset": "chain_sum", "parameters": {"min_terms": 2}})
    tree["optimizer"] = {"lr": "1e-6", "betas": [0.9, 0.95], "schedule": "cosine"}
    tree["tracking"] = {"wandb": {"project": "p", "tags": ["a", "b"]}}
    tree["data"]["prompts"] = {"system": "Antworte knapp, größte Zahl zuerst: \\boxed{}\nzweite Zeile"}
    recipe = parse_recipe(tree)
    save_recipe(recipe, tmp_path / "saved" / "recipe.yaml")
    assert load_recipe(tmp_path / "saved" / "recipe.yaml") == recipe
    assert yaml.safe_load((tmp_path / "saved" / "recipe.yaml").read_text())["optimizer"]["lr"] == 1e-6


def test_saved_recipe_of_all_defaults_reads_back_equal(tree: Tree, tmp_path: Path) -> None:
    sections = {key: tree[key] for key in ("output", "model", "data")} | {"objective": {"name": "grpo"}}
    recipe = parse_recipe(sections)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "found", "value"),
    [
        ("train.steps=7", lambda r: r.train.steps, 7),
        ("optimizer.lr=1e-6", lambda r: r.optimizer.lr, 1e-6),  # YAML 1.1 takes 1e-6 for text
        ("optimizer.lr=2.5E-5", lambda r: r.optimizer.lr, 2.5e-5),
        ("optimizer.betas=[0.9, 0.95]", lambda r: r.optimizer.betas, (0.9, 0.95)),
        ("optimizer.betas.1=0.5", lambda r: r.optimizer.betas, (0.8, 0.5)),
        ("evaluation.k=[1]", lambda r: r.evaluation.k, [1]),
        ("evaluation.k.0=2", lambda r: r.evaluation.k, [2, 2]),
        ("data.train.0.size=5", lambda r: r.data.train[0].size, 5),
        ("data.train[0].size=5", lambda r: r.data.train[0].size, 5),
        ("data.train.0={kind: digit_sums, lengths: [9]}", lambda r: r.data.train[0].lengths, [9]),
        ("data.evaluation=[]", lambda r: r.data.evaluation, []),
        ("objective.distill.top_k=4", lambda r: r.objective.distill.top_k, 4),
        ("objective={name: grpo}", lambda r: r.objective.name, "grpo"),
        ("rollout.embedded.max_batch_sequences=3", lambda r: r.rollout.embedded.max_batch_sequences, 3),
        ("tracking.wandb.project=a=b", lambda r: r.tracking.wandb.project, "a=b"),
        ("tracking.wandb.project='7'", lambda r: r.tracking.wandb.project, "7"),
        ("evaluation.every=null", lambda r: r.evaluation.every, None),
        ("evaluation.every=", lambda r: r.evaluation.every, None),
        ("parallel.sequence=false", lambda r: r.parallel.sequence, False),
        ("data.prompts.student={{ question }}?", None, None),
        ("data.prompts.student='{{ question }}?'", lambda r: r.data.prompts.student, "{{ question }}?"),
    ],
)
def test_overrides(
    override: str,
    found: Callable[[Recipe], Any] | None,
    value: Any,
    tree: Tree,
    write_recipe: Callable[[Tree], Path],
) -> None:
    tree["optimizer"] = {"betas": [0.8, 0.9]}
    tree["evaluation"]["every"] = 1
    path = write_recipe(tree)
    if found is None:  # YAML takes braces for a mapping: an error, not a prompt that nobody wrote
        with pytest.raises(RecipeError, match=r"override 'data.prompts.student.*needs quotes"):
            load_recipe(path, [override])
    else:
        assert found(load_recipe(path, [override])) == value


@pytest.mark.parametrize("value", ["1e400", ".inf", ".nan", "-1e999"])
def test_a_number_that_is_not_finite_is_refused(value: str, tree: Tree, write_recipe: Callable[[Tree], Path]) -> None:
    with pytest.raises(RecipeError, match=r"rollout\.temperature: .*finite number"):
        load_recipe(write_recipe(tree), [f"rollout.temperature={value}"])


@pytest.mark.parametrize("override", ["train.steps=true", "optimizer.lr=yes", "data.train.0.lengths=[2, on]"])
def test_a_boolean_is_no_number(override: str, tree: Tree, write_recipe: Callable[[Tree], Path]) -> None:
    """YAML reads yes and on as true, and pydantic would take true as 1."""
    key = "data.train.0.lengths.1" if "lengths" in override else override.partition("=")[0]
    with pytest.raises(RecipeError, match=re.escape(f"{key}: must be a number (given: true)")):
        load_recipe(write_recipe(tree), [override])
    assert load_recipe(write_recipe(tree), ["train.steps=1", "parallel.sequence=true"]).train.steps == 1


@pytest.mark.parametrize(
    "override", ["train.steps=-1", "trian.steps=3", "train.step=3", "data.train[0].lengths=[2, on]"]
)
def test_an_error_names_the_override_that_made_it(
    override: str, tree: Tree, write_recipe: Callable[[Tree], Path]
) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"override '{override}': ")):
        load_recipe(write_recipe(tree), [override])
    path = write_recipe(tree | {"seed": "x"})
    with pytest.raises(RecipeError, match=rf"^{re.escape(str(path))}:\d+: seed: "):
        load_recipe(path, ["train.steps=3"])


def test_later_overrides_win_and_the_file_stays(tree: Tree, write_recipe: Callable[[Tree], Path]) -> None:
    path = write_recipe(tree)
    assert load_recipe(path, ["train.steps=5", "train.steps=6"]).train.steps == 6
    assert load_recipe(path).train.steps == tree["train"]["steps"]


def test_override_of_an_anchor_changes_one_place(tree: Tree, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    tree["warmup"] = {"optimizer": tree["optimizer"]}
    path.write_text(yaml.safe_dump(tree))
    assert "&id" in path.read_text()
    recipe = load_recipe(path, ["optimizer.lr=0.5"])
    assert (recipe.optimizer.lr, recipe.warmup.optimizer.lr) == (0.5, 1e-3)


leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.text("ab1-", max_size=3))
keys = st.text("abc_", min_size=1, max_size=4)
trees = st.dictionaries(keys, st.recursive(leaves, lambda t: st.lists(t, max_size=3) | st.dictionaries(keys, t)))


@settings(max_examples=80, deadline=None)
@given(trees, st.lists(keys | st.integers(0, 4).map(str), min_size=1, max_size=4), leaves)
def test_override_sets_its_key_and_nothing_else(tree: Tree, path: list[str], value: Any) -> None:
    before = copy.deepcopy(tree)
    try:
        apply_override(tree, f"{'.'.join(path)}={yaml.safe_dump(value).strip()}")
    except RecipeError:
        return
    node: Any = tree
    for part in path:
        node = node[int(part)] if isinstance(node, list) else node[part]
    assert node == value
    beside, there_before = _without(tree, path), _without(before, path)
    while there_before is not None:  # where the path led nowhere before, there was nothing beside it
        assert beside[0] == there_before[0]
        beside, there_before = beside[1], there_before[1]


def _without(tree: Any, path: list[str]) -> Any:
    """All of the tree that is not on the path or below its end."""
    key, *rest = path
    if isinstance(tree, list):
        beside = [item for i, item in enumerate(tree) if i != int(key)]
        inner = tree[int(key)]
    else:
        beside = {name: item for name, item in tree.items() if name != key}
        inner = tree.get(key)
    return beside, _without(inner, rest) if rest and inner else None


def test_every_key_is_described() -> None:
    undescribed = [path for path, field in _fields(Recipe, "") if not field.description and not _is_section(field)]
    sections = [model for model in _models(Recipe, set()) if not model.__doc__]
    assert not undescribed
    assert not sections


def test_descriptions_are_sentences() -> None:
    wrong = [(p, f.description) for p, f in _fields(Recipe, "") if f.description and f.description[-1] not in ".)"]
    assert not wrong


def test_every_section_refuses_unknown_keys() -> None:
    models = _models(Recipe, set())
    assert len(models) > 15
    assert not [model.__name__ for model in models if model.model_config.get("extra") != "forbid"]


def _is_section(field: Any) -> bool:
    return bool(_members(field.annotation)) and field.discriminator is None


def _fields(model: type[BaseModel], path: str) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        if name in ("kind", "name") and get_origin(field.annotation) is not Union and path:
            tags = get_args(field.annotation)
            if len(tags) == 1:
                continue  # the tag that chooses the section: the section's own text describes it
        yield f"{path}{name}", field
        for member in _members(field.annotation):
            yield from _fields(member, f"{path}{name}.")


def _models(model: type[BaseModel], seen: set[type[BaseModel]]) -> set[type[BaseModel]]:
    seen.add(model)
    for field in model.model_fields.values():
        for member in _members(field.annotation):
            if member not in seen:
                _models(member, seen)
    return seen


def _members(annotation: Any) -> list[type[BaseModel]]:
    """Sections anywhere in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType, list, dict, tuple):
        return [member for part in get_args(annotation) for member in _members(part)]
    return []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: path.parent.name + "/" + path.name
)
def test_example_parses(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.data.train


@pytest.fixture
def architecture(tiny_model: Path) -> Architecture:
    return read_architecture(tiny_model)


def test_all_reasons_of_an_impossible_recipe_at_once(tree: Tree, architecture: Architecture) -> None:
    tree["parallel"] = {"tensor": 3, "pipeline": 5}
    tree["rollout"]["max_new_tokens"] = 500
    tree["objective"]["distill"]["top_k"] = 99
    with pytest.raises(RecipeError) as error:
        check_recipe(parse_recipe(tree), architecture, 15)
    keys = {line.partition(":")[0] for line in str(error.value).splitlines()}
    assert keys == {
        "parallel",
        "data.prompts.max_prompt_tokens",
        "data.prompts.max_privileged_tokens",
        "train.micro_batch_tokens",
        "objective.distill.top_k",
    }


def test_a_sequence_that_ranks_share_must_fit_with_its_padding(tree: Tree, architecture: Architecture) -> None:
    longest = tree["data"]["prompts"]["max_privileged_tokens"] + tree["rollout"]["max_new_tokens"]
    tree["rollout"]["max_new_tokens"] += -longest % 4 + 1
    longest += -longest % 4 + 1
    tree["parallel"] = {"context": 2}
    tree["train"]["micro_batch_tokens"] = longest + 3
    assert check_recipe(parse_recipe(tree), architecture, 2) == []
    tree["train"]["micro_batch_tokens"] = longest
    with pytest.raises(
        RecipeError, match=f"train.micro_batch_tokens: {longest} .*, padded to {longest + 3} for parallel"
    ):
        check_recipe(parse_recipe(tree), architecture, 2)


def test_routing_replay_needs_experts_and_an_engine_that_tells_them(tree: Tree, architecture: Architecture) -> None:
    tree["rollout"] |= {"routing_replay": True, "engine": "sglang"}
    with pytest.raises(RecipeError) as error:
        check_recipe(parse_recipe(tree), architecture, 1)
    no_memory, no_experts = sorted(str(error.value).splitlines(), key=lambda line: "no experts" in line)
    assert no_memory.startswith("rollout.routing_replay: SGLang cannot return routed experts on a CPU")
    assert no_experts.startswith("rollout.routing_replay:") and "has no experts" in no_experts
    tree["rollout"]["engine"] = "embedded"
    experts = replace(architecture, num_experts=8, experts_per_token=2, expert_ffn_size=16)
    assert check_recipe(parse_recipe(tree), experts, 1) == []
    tree["rollout"] |= {"engine": "sglang", "ahead": 1, "swap": "mid_generation"}
    with pytest.raises(RecipeError, match="swap=mid_generation expert choices would come from the new weights"):
        check_recipe(parse_recipe(tree), experts, 1)


def test_experts_of_a_server_are_distributed_evenly_and_speculation_is_warned_of(
    tree: Tree, architecture: Architecture
) -> None:
    experts = replace(architecture, num_experts=6, experts_per_token=2, expert_ffn_size=16)

    def checked(model: Architecture, tensor_parallel: int = 4, **rollout: Any) -> list[str]:
        servers = {"tensor_parallel": tensor_parallel, "extra_args": rollout.pop("extra_args")}
        tree["rollout"] |= {"engine": "sglang", "sglang": {"servers": servers}, "routing_replay": False} | rollout
        return check_recipe(parse_recipe(tree | {"device": "cuda"}), model, 4)

    assert checked(experts, extra_args={"ep-size": 2}) == []
    with pytest.raises(RecipeError, match="ep-size=3 does not divide tensor_parallel=4, the ranks of a server"):
        checked(experts, extra_args={"--expert_parallel_size": 3})
    with pytest.raises(RecipeError, match="ep-size=4 does not divide the model's 6 experts"):
        checked(experts, extra_args={"ep": "4"})
    with pytest.raises(RecipeError, match=r"ep-size=2, but .* has no experts"):
        checked(architecture, extra_args={"ep-size": 2})
    (warning,) = checked(architecture, extra_args={"speculative-algorithm": "NGRAM"})
    assert "nobody has seen speculative decoding on a GPU" in warning
    with pytest.raises(
        RecipeError, match="routing_replay: SGLang does not record the experts of tokens that it decodes"
    ):
        checked(experts, extra_args={"speculative-algorithm": "NGRAM"}, routing_replay=True)


def test_training_state_leaves_only_gpus_that_servers_share_in_turns(tree: Tree, architecture: Architecture) -> None:
    tree["rollout"] |= {"engine": "sglang", "sglang": {"trainer_memory": "all"}}
    with pytest.raises(RecipeError, match=r"trainer_memory=all: servers never release.*memory_saver=true"):
        check_recipe(parse_recipe(tree | {"device": "cuda"}), architecture, 1)
    assert check_recipe(parse_recipe(tree | {"device": "cpu"}), architecture, 1) == []
    tree["rollout"]["ahead"] = 1
    with pytest.raises(RecipeError, match=r"trainer_memory=all: with rollout.ahead"):
        check_recipe(parse_recipe(tree | {"device": "cpu"}), architecture, 1)
    tree["rollout"]["sglang"] |= {"placement": "given", "urls": ["http://a:1"]}
    with pytest.raises(RecipeError, match="trainer_memory: only with placement=colocated"):
        parse_recipe(tree)


def test_what_is_said_of_rollouts_ahead(tree: Tree, architecture: Architecture) -> None:
    tree["rollout"] |= {"engine": "sglang", "ahead": 3}
    corrected, waits = check_recipe(parse_recipe(tree | {"device": "cpu"}), architecture, 1)
    assert "rollouts are up to 3 steps old" in corrected and "importance_cap=2.0 is used" in corrected
    assert "rollout.swap=after_batch: each weight sync waits" in waits
    tree["rollout"]["swap"] = "mid_generation"
    tree["objective"]["surrogate"] = {"importance_cap": 1.5}
    assert check_recipe(parse_recipe(tree | {"device": "cpu"}), architecture, 1) == []
    tree["rollout"]["ahead"] = 1
    tree["objective"] = {"name": "opsd", "distill": {"top_k": 8}}
    (nothing,) = check_recipe(parse_recipe(tree | {"device": "cpu"}), architecture, 1)
    assert "one step old, and objective opsd has no surrogate" in nothing
    tree["objective"]["distill"]["importance_cap"] = 2.0
    assert check_recipe(parse_recipe(tree | {"device": "cpu"}), architecture, 1) == []
    tree["rollout"]["ahead"] = -1
    with pytest.raises(RecipeError, match=r"rollout\.ahead: "):
        parse_recipe(tree)


def test_a_server_that_would_cut_a_response_short_is_refused(tree: Tree, architecture: Architecture) -> None:
    tree["rollout"]["engine"] = "sglang"
    longest = tree["data"]["prompts"]["max_privileged_tokens"] + tree["rollout"]["max_new_tokens"]
    for key in ("context_length", "max_total_tokens"):
        tree["rollout"]["sglang"] = {"servers": {key: longest + 2}}
        assert check_recipe(parse_recipe(tree), architecture, 1) == []
        tree["rollout"]["sglang"] = {"servers": {key: longest + 1}}
        with pytest.raises(
            RecipeError, match=rf"servers.{key}: {longest + 1} cannot hold .*, together {longest} tokens"
        ):
            check_recipe(parse_recipe(tree), architecture, 1)
    tree["rollout"]["sglang"] = {}
    assert check_recipe(parse_recipe(tree), replace(architecture, max_positions=longest + 2), 1) == []
    with pytest.raises(RecipeError, match=rf"context_length: {longest + 1} cannot hold"):
        check_recipe(parse_recipe(tree), replace(architecture, max_positions=longest + 1), 1)


def test_sections_that_contradict_each_other_need_no_model(tree: Tree) -> None:
    check_sections(parse_recipe(tree))
    tree["rollout"]["ahead"] = 1
    tree["teacher"] = {"kind": "external", "path": "/nowhere"}
    tree["model"]["path"] = str(Path(tree["output"]) / "hf")
    with pytest.raises(RecipeError) as error:
        check_sections(parse_recipe(tree))
    keys = [line.partition(":")[0] for line in str(error.value).splitlines()]
    assert keys == ["teacher.kind", "rollout.ahead", "model.path"]


@pytest.mark.parametrize(
    ("sglang", "minutes", "key"),
    [
        ({"request_timeout_s": 3600}, 60, "request_timeout_s=3600 s"),
        ({"servers": {"start_timeout_s": 4000}}, 60, "servers.start_timeout_s=4000 s"),
        ({"sync": {"timeout_s": 700}, "request_timeout_s": 60}, 11, "sync.timeout_s=700 s"),
    ],
)
def test_a_rank_without_progress_is_given_as_long_as_a_server(
    sglang: dict[str, Any], minutes: float, key: str, tree: Tree
) -> None:
    tree["rollout"] |= {"engine": "sglang", "sglang": {"placement": "given", "urls": ["http://a"]} | sglang}
    if "servers" in sglang:
        tree["rollout"]["sglang"] = sglang
    tree["parallel"] = {"silence_minutes": minutes}
    with pytest.raises(RecipeError, match=f"parallel.silence_minutes: .* than rollout.sglang.{key}") as error:
        check_sections(parse_recipe(tree))
    assert len(str(error.value).splitlines()) == 1
    tree["parallel"] = {"silence_minutes": 100}
    check_sections(parse_recipe(tree))


WITHOUT_TORCH = """
import sys
for name in ("torch", "megatron", "transformers"):
    sys.modules[name] = None  # an import of it raises ImportError
from megatron_hdpo.config import check_sections, load_recipe
recipe = load_recipe(sys.argv[1])
check_sections(recipe)
print(recipe.objective.name)
"""


def test_a_recipe_is_read_and_checked_without_torch() -> None:
    """Importing torch and Megatron takes seconds; a wrong key is reported before that."""
    recipe = ROOT / "examples" / "methods" / "opd.yaml"
    ended = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, recipe], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "opd\n"), ended.stderr


def test_limits_are_inclusive(tree: Tree, architecture: Architecture) -> None:
    tree["rollout"]["max_new_tokens"] = 128 - 32
    tree["train"]["micro_batch_tokens"] = 128
    tree["objective"]["distill"]["top_k"] = architecture.vocab_size
    tree["evaluation"]["max_new_tokens"] = 128 - 16
    assert check_recipe(parse_recipe(tree), architecture, 1) == []


@pytest.mark.parametrize(
    ("section", "key", "value", "warning"),
    [
        ("rollout", "top_p", 0.9, "importance ratios are biased"),
        ("rollout", "top_k", 5, "importance ratios are biased"),
        ("rollout", "samples_per_prompt", 1, "a group of one has advantage 0"),
    ],
)
def test_warnings(section: str, key: str, value: Any, warning: str, tree: Tree, architecture: Architecture) -> None:
    tree[section][key] = value
    warnings = check_recipe(parse_recipe(tree), architecture, 1)
    assert len(warnings) == 1 and warning in warnings[0]


@pytest.fixture(scope="session")
def larger_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same vocabulary; heads that TP 3 does not divide."""
    return make_model(tmp_path_factory.mktemp("larger") / "model", hidden=48)


EXTERNAL = {"kind": "external", "path": "LARGER"}


@pytest.mark.parametrize(
    ("objective", "teacher", "reason"),
    [
        ({"name": "grpo"}, {"kind": "ema"}, "teacher.kind: ema, but objective grpo has no teacher"),
        (
            {"name": "hdpo", "distill": {"top_k": 5}},
            EXTERNAL,
            "teacher.kind: external, but objective hdpo learns from policy or frozen or",
        ),
        ({"name": "opd"}, {"kind": "policy"}, "teacher.kind: policy, but objective opd learns from frozen or"),
        ({"name": "opd"}, EXTERNAL, None),
        (
            {"name": "opd"},
            {"kind": "external", "path": "/nowhere"},
            "teacher.path: /nowhere/config.json does not exist",
        ),
        ({"name": "opd", "estimator": "top_k"}, EXTERNAL, "objective.distill.top_k: 64 exceeds the vocabulary"),
        ({"name": "opd", "estimator": "full"}, EXTERNAL, None),
        (
            {"name": "opd", "estimator": "top_k", "distill": {"support": "full"}},
            EXTERNAL,
            "objective.distill.support: full is what estimator=full does",
        ),
        ({"name": "vopd"}, {"kind": "frozen"}, None),
        ({"name": "vopd", "baseline": {"kind": "top_k"}}, {"kind": "frozen"}, "objective.baseline.top_k: 100 exceeds"),
        ({"name": "akl", "distill": {"kind": "akl", "tail": "bucket", "top_k": 5}}, {"kind": "frozen"}, None),
        (
            {"name": "akl", "distill": {"kind": "akl", "tail": "bucket", "top_k": 5}},
            {"kind": "policy"},
            "objective.tokens: student, but teacher.kind=policy agrees with the student",
        ),
        (
            {"name": "akl", "tokens": "teacher", "distill": {"kind": "akl", "tail": "bucket", "top_k": 5}},
            {"kind": "policy"},
            None,
        ),
        (
            {"name": "akl", "distill": {"top_k": 5}},
            {"kind": "frozen"},
            "objective.distill.kind: jsd, but objective akl",
        ),
        (
            {"name": "akl", "distill": {"kind": "akl", "top_k": 5}},
            {"kind": "frozen"},
            "objective.distill.kind: akl is infinite where the teacher is cut to zero",
        ),
        (
            {"name": "hdpo", "logits_from": "rollout", "distill": {"support": "student", "top_k": 5}},
            {"kind": "policy"},
            "objective.logits_from: rollout gives the teacher's top k, but distill.support is student",
        ),
    ],
)
def test_objectives_and_teachers(
    objective: Tree, teacher: Tree, reason: str | None, tree: Tree, architecture: Architecture, larger_model: Path
) -> None:
    tree["objective"] = objective
    tree["teacher"] = {key: str(larger_model) if value == "LARGER" else value for key, value in teacher.items()}
    if reason is None:
        assert check_recipe(parse_recipe(tree), architecture, 1) == []
        return
    with pytest.raises(RecipeError) as error:
        check_recipe(parse_recipe(tree), architecture, 1)
    assert len(str(error.value).splitlines()) == 1 and str(error.value).startswith(reason)


def test_an_external_teacher_has_the_layout_and_the_positions(
    tree: Tree, architecture: Architecture, tmp_path: Path
) -> None:
    short = make_model(tmp_path / "short", heads=3, kv_heads=3, hidden=48, max_positions=16)
    tree["objective"], tree["teacher"] = {"name": "opd"}, {"kind": "external", "path": str(short)}
    tree["parallel"] = {"tensor": 2}
    with pytest.raises(RecipeError) as error:
        check_recipe(parse_recipe(tree), architecture, 2)
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and all(line.startswith("teacher.path: ") for line in lines)
    assert "3 attention heads" in lines[0] and "16 positions, sequences may have" in lines[1]


def test_a_teacher_must_know_every_token(architecture: Architecture) -> None:
    assert list(check_sizes(replace(architecture, vocab_size=architecture.vocab_size + 8), architecture, "there")) == []
    smaller = replace(architecture, vocab_size=architecture.vocab_size - 1)
    (error,) = check_sizes(smaller, architecture, "there")
    assert error.startswith("teacher.path: there has a vocabulary of")
