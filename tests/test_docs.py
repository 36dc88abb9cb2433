"""The documents say what is so: their code runs as written, and the files that they name are there."""

import math
import re
import shlex
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import pytest
from pydantic import Field, TypeAdapter

from megatron_hdpo import commands
from megatron_hdpo.config import RecipeError, load_recipe
from megatron_hdpo.data.tasks import DigitSumsTask
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.registry import ObjectiveConfig
from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, Group, Sample

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [command.name for command in commands.ALL]


def _sample(reward: float, length: int) -> Sample:
    ids = np.arange(length, dtype=np.int32)
    completion = Completion(ids, np.full(length, -1.0, np.float32), "stop", np.zeros(length, np.int32))
    return Sample(completion, "text", reward)


def test_the_example_objective_of_the_docs_works_as_written():
    text = (ROOT / "docs" / "adding-an-objective.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespace: dict = {}
    exec(code, namespace)
    objective = namespace["Rejection"](namespace["RejectionConfig"](), ObjectiveDeps())
    group = Group(Problem("p/0", "p", "q", "1"), np.array([5, 6], np.int32), [_sample(1.0, 3), _sample(0.0, 4)])
    (example,) = objective.examples([group], {})
    assert objective.privileged_rollouts_for(group, 0) == 0 and objective.scorings([group]) == []
    assert example.surrogate_count == 3 and example.advantages_T.tolist() == [1, 1, 1]
    assert example.response_ids.tolist() == [0, 1, 2] and not example.inert


def test_the_example_task_of_the_docs_works_as_written():
    text = (ROOT / "docs" / "adding-a-task.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.partition("class ")[2].splitlines()) <= 32
    namespace: dict = {}
    exec(code, namespace)
    made = namespace["DivisorsTask"]
    task = made(size=20)
    problems = task.problems(LoadReport())
    assert problems == task.problems(LoadReport()) != made(size=20, seed=1).problems(LoadReport())
    for problem in problems:
        a, b = map(int, re.findall(r"\d+", problem.question))
        right = f"\\boxed{{{math.gcd(a, b)}}}"
        assert task.score(problem, right) == 1.0 and task.feedback(problem, right) is None
        assert task.score(problem, "\\boxed{0}") == 0.0 and "divide both" in task.feedback(problem, "\\boxed{0}")
    TypeAdapter(Annotated[made | DigitSumsTask, Field(discriminator="kind")])


def test_the_table_of_methods_has_every_method_and_keys_that_exist():
    table = (ROOT / "docs" / "methods.md").read_text().partition("## Teachers")[0]
    lines = [line for line in table.splitlines() if line.startswith("| `") and not line.startswith("| `name`")]
    rows = [line.split("`")[1] for line in lines]
    configs = {config.model_fields["name"].default: config for config in get_args(get_args(ObjectiveConfig)[0])}
    assert set(rows) == set(configs)
    for name, line in zip(rows, lines, strict=True):
        for key in re.findall(r"`([\w.]+)`", line.split("|")[5]):
            section = configs[name]
            for part in key.split("."):
                assert part in section.model_fields, f"{name} has no key {key}"
                section = section.model_fields[part].annotation


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document):
    named = re.findall(
        r"`((?:megatron_hdpo|examples|tools|tests|docs|benchmarks)/[\w./-]*[\w/])`", document.read_text()
    )
    missing = [
        name for name in named if not (ROOT / name).exists() and not name.endswith(("rejection.py", "divisors.py"))
    ]
    assert not missing, f"{document.name} names {missing}"


COMMAND = re.compile(r"(?:python|megatron_hdpo|make|torchrun|bash|sbatch|source|examples/\S+\.sh|\./\S+)(?:\s|$)")
ASSIGNMENT = re.compile(r"[A-Z][A-Z_0-9]*=\S*")


def commands_of(document: Path) -> list[list[str]]:
    """Return the commands in a document's code blocks and in backticks, as words, without variables before them."""
    text = document.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^(?: {4}|\t)(.*)$", text, re.MULTILINE)
    blocks += "\n".join(re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).splitlines()
    lines = blocks + re.findall(r"`([^`\n]+)`", text)
    found = []
    for line in lines:
        words = re.sub(r"\s#\s.*", "", line.strip().removeprefix("$ ")).removesuffix("&").strip()
        while ASSIGNMENT.match(words):
            words = words.partition(" ")[2].strip()
        if COMMAND.match(words):
            found.append(shlex.split(words))
    return found


def faults(words: list[str]) -> list[str]:
    """Return what a command names that does not exist: files, make targets, commands of the package, recipe keys."""
    wrong = [word for word in words if _is_own_file(word) and not (ROOT / word).exists()]
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        wrong += [f"make {word}" for word in words[1:] if "=" not in word and word not in targets]
    arguments = words[words.index("megatron_hdpo") + 1 :] if "megatron_hdpo" in words else None
    if arguments and arguments[0] not in COMMANDS:
        wrong.append(f"megatron_hdpo {arguments[0]}")
    recipes = [word for word in words if word.endswith(".yaml") and (ROOT / word).exists()]
    overrides = [word for word in words if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)*=.*", word)]
    if recipes:
        try:
            load_recipe(ROOT / recipes[0], overrides)
        except RecipeError as error:
            wrong.append(str(error))
    return wrong


def _is_own_file(word: str) -> bool:
    return bool(re.fullmatch(r"(?:\./)?(?:examples|tools|tests|docs)/[\w./-]+|[\w/]+\.(?:py|sh|sbatch|yaml)", word))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_a_document_name_what_exists(document):
    wrong = {" ".join(words): found for words in commands_of(document) if (found := faults(words))}
    assert not wrong, f"{document.name}: {wrong}"


def test_the_walk_sees_the_commands_and_their_faults():
    assert ["python", "-m", "megatron_hdpo", "doctor"] in commands_of(ROOT / "README.md")
    assert sum(len(commands_of(document)) for document in DOCUMENTS) >= 25
    recipe = "examples/digit_sums/hdpo.yaml"
    assert faults(["python", "-m", "megatron_hdpo", "train", recipe, "train.steps=2"]) == []
    assert faults(["python", "-m", "megatron_hdpo", "fly"]) == ["megatron_hdpo fly"]
    assert faults(["python", "tools/no_such_tool.py"]) == ["tools/no_such_tool.py"]
    assert faults(["make", "no-such-target"]) == ["make no-such-target"]
    assert "train.stepz" in faults(["examples/cluster/one_node.sh", recipe, "train.stepz=2"])[0]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_with_commands_says_how_to_activate_the_environment(document):
    if any(words[0] in ("python", "torchrun") or "examples/" in words[0] for words in commands_of(document)):
        assert "source .venv/bin/activate" in document.read_text()


def test_the_readme_activates_the_environment_right_after_its_two_commands():
    words = [" ".join(words) for words in commands_of(ROOT / "README.md")][:3]
    assert words == ["make quickstart", "make test", "source .venv/bin/activate"]
