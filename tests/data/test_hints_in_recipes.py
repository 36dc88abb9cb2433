"""Recipes of methods with hints: what is missing is said before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipes import make_model, small_recipe
from tiny_tokenizers import byte_tokenizer

from megatron_hdpo.config import RecipeError, check_recipe, parse_recipe
from megatron_hdpo.data.config import DataConfig
from megatron_hdpo.data.load import load
from megatron_hdpo.model.architecture import read_architecture

TOP = {"tail": "bucket", "top_k": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def refused(model: Path, tmp_path: Path) -> Callable[..., str]:
    """The reasons against a recipe, one per line; the empty string for one that runs."""

    def reasons(objective: dict[str, Any], hint: str | None = None, teacher: str = "frozen", **rollout: Any) -> str:
        tree = small_recipe(model, tmp_path / "run") | {"objective": objective, "teacher": {"kind": teacher}}
        tree["rollout"] |= rollout
        tree["data"]["prompts"] |= {} if hint is None else {"hint": hint}
        try:
            check_recipe(parse_recipe(tree), read_architecture(model), 1)
        except RecipeError as error:
            return str(error)
        return ""

    return reasons


@pytest.mark.parametrize(
    ("objective", "shown"),
    [
        ({"name": "sdpo", "distill": TOP}, {"attempt", "feedback"}),
        ({"name": "sdpo", "distill": TOP, "demonstration": {"sources": ["feedback"]}}, {"feedback"}),
        ({"name": "srpo", "distill": TOP}, {"attempt"}),
        ({"name": "rlsd", "evidence": "contrast"}, {"attempt"}),
        ({"name": "rlsd"}, set()),
        ({"name": "rlcsd"}, {"attempt"}),
        ({"name": "contrastive_opsd", "distill": TOP}, {"attempt"}),
        ({"name": "opsd", "distill": TOP}, set()),
        ({"name": "paced", "distill": TOP}, set()),
    ],
)
def test_the_template_must_use_what_the_method_shows(refused, objective: dict[str, Any], shown: set[str]) -> None:
    assert refused(objective) == ""  # the default template uses all
    for used in ("attempt", "feedback"):
        reason = refused(objective, hint="{{ question }} {{ " + used + " }}")
        missing = " and ".join(sorted(shown - {used}))
        expected = (
            f"data.prompts.hint: the template does not use {missing}, which {objective['name']} shows to its teacher"
        )
        assert reason == (expected if missing else "")


@pytest.mark.parametrize(("limit", "said"), [(None, True), (29, True), (30, False), (100, False)])
@pytest.mark.parametrize("objective", [{"name": "sdpo", "distill": TOP}, {"name": "rlsd", "evidence": "contrast"}])
def test_check_says_when_the_longest_sibling_cannot_fit(
    model: Path, tmp_path: Path, objective: dict[str, Any], limit: int | None, said: bool
) -> None:
    tree = small_recipe(model, tmp_path / "run") | {"objective": objective, "teacher": {"kind": "frozen"}}
    tree["data"]["prompts"] |= {"max_prompt_tokens": 10, "max_privileged_tokens": limit}
    tree["rollout"] |= {"max_new_tokens": 20}
    if limit is None:
        tree["data"]["prompts"]["max_prompt_tokens"], tree["rollout"]["max_new_tokens"] = 20, 21
    lines = check_recipe(parse_recipe(tree), read_architecture(model), 1)
    found = [line for line in lines if line.startswith("data.prompts.max_privileged_tokens")]
    assert len(found) == said
    if limit == 29:
        assert "29 tokens hold a prompt of 10 and 19 of a sibling's response" in found[0]
        assert "rollout.max_new_tokens=20: of longer ones only the end is shown" in found[0]
    assert not [line for line in _warnings_of(tree, model, {"name": "grpo"}) if "max_privileged" in line]


def _warnings_of(tree: dict[str, Any], model: Path, objective: dict[str, Any]) -> list[str]:
    return check_recipe(
        parse_recipe(tree | {"objective": objective, "teacher": {"kind": "policy"}}), read_architecture(model), 1
    )


@pytest.mark.parametrize(
    ("objective", "rollout", "reason"),
    [
        ({"name": "rlcsd"}, {"samples_per_prompt": 2}, "objective.name: rlcsd needs rollout.samples_per_prompt of 3"),
        ({"name": "opsd"}, {}, "objective.distill.top_k: 100 exceeds the vocabulary"),
        ({"name": "srpo", "aggregation": "sequence", "distill": TOP}, {}, "objective.aggregation: srpo divides"),
        ({"name": "rlcsd", "aggregation": "sequence"}, {}, "recipe: objective.aggregation"),
        (
            {"name": "sdpo", "distill": TOP, "demonstration": {"sources": ["oracle"]}},
            {},
            "recipe: objective.demonstration",
        ),
    ],
)
def test_recipes_that_cannot_be_run(refused, objective: dict[str, Any], rollout: dict[str, Any], reason: str) -> None:
    assert refused(objective, **rollout).startswith(reason)


def test_problems_that_do_not_fit_beside_a_hint_are_left_out() -> None:
    """The template's own words take 300 tokens; a problem of 1000 leaves no room for them, although alone it fits."""
    config = DataConfig.model_validate(
        {
            "train": [{"kind": "knights_knaves", "people": [2, 12], "size": 8}],
            "prompts": {
                "student": "{{ question }}",
                "hint": "{{ question }} {{ attempt }} {{ feedback }} " + "understand it. " * 20,
                "max_prompt_tokens": 3000,
                "max_privileged_tokens": 1000,
            },
        }
    )
    tokenizer = byte_tokenizer()
    assert len(load(config, tokenizer, privileged=False).train) == 8
    data = load(config, tokenizer, privileged=False, hints=True)
    assert {p.level for p in data.train} == {"2"} and len(data.train) == 4
    assert data.report.counts == {"knights_knaves": {"prompt too long": 4}}
