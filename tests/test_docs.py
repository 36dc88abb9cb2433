"""The documents say what is so: their code runs as written, and the files that they name are there."""

import math
import re
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import pytest
from pydantic import Field, TypeAdapter

from megatron_hdpo.data.problem import Problem
from megatron_hdpo.data.report import LoadReport
from megatron_hdpo.data.tasks import DigitSumsTask
from megatron_hdpo.objectives.registry import ObjectiveConfig
from megatron_hdpo.rollout.types import Completion, Group, Sample

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _sample(reward: float, length: int) -> Sample:
    ids = np.arange(length, dtype=np.int32)
    completion = Completion(ids, np.full(length, -1.0, np.float32), "stop", np.zeros(length, np.int32))
    return Sample(completion, "text", reward)


def test_the_example_objective_of_the_docs_works_as_written():
    text = (ROOT / "docs" / "adding-an-objective.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespace: dict = {}
    exec(code, namespace)
    objective = namespace["Rejection"](namespace["RejectionConfig"](), temperature=1.0)
    group = Group(Problem("p/0", "p", "q", "1"), np.array([5, 6], np.int32), [_sample(1.0, 3), _sample(0.0, 4)])
    (example,) = objective.examples([group], {})
    assert objective.privileged(group, 0) == 0 and objective.scorings([group]) == []
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
