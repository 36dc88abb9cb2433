"""The documents say what is so: their code runs as written, and the files that they name are there."""

import ast
import json
import math
import re
import shutil
from pathlib import Path
from typing import get_args

import pytest
import recipe_gallery
from documents import files_of
from syntax import syntax_tree
from transformers import MistralConfig, MistralForCausalLM

from megatron_hdpo.model.architecture import ArchitectureError, Family, parse_architecture, read_architecture
from megatron_hdpo.objectives.registry import OBJECTIVES
from megatron_hdpo.types.load_report import LoadReport

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_example_task_of_the_docs_works_as_written():
    namespace: dict = {}
    exec(files_of("adding-a-task.md")["my-lab/divisors.py"], namespace)
    made = namespace["Divisors"]
    task = made(size=20)
    problems = task.problems(LoadReport())
    assert problems == task.problems(LoadReport()) != made(size=20, seed=1).problems(LoadReport())
    for problem in problems:
        right = str(math.gcd(*map(int, re.findall(r"\d+", problem.question))))
        assert task.score(problem, right) == 1.0 and task.feedback(problem, right) is None
        assert task.score(problem, "0") == 0.0 and "divide both" in task.feedback(problem, "0")


def test_a_model_under_another_name_is_read_as_the_docs_say(tmp_path, monkeypatch):
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    config = MistralConfig(**small, num_hidden_layers=2, vocab_size=64, sliding_window=None)
    MistralForCausalLM(config).save_pretrained(tmp_path / "original")
    with pytest.raises(ArchitectureError, match="MistralForCausalLM is not supported"):
        read_architecture(tmp_path / "original")
    shutil.copytree(tmp_path / "original", tmp_path / "renamed")
    text = (ROOT / "docs" / "adding-a-model.md").read_text()
    said = json.loads("{" + re.search(r'`("architectures": .*?)`', text)[1] + "}")
    changed = json.loads((tmp_path / "original" / "config.json").read_text()) | said
    (tmp_path / "renamed" / "config.json").write_text(json.dumps(changed))
    assert read_architecture(tmp_path / "renamed").family == "llama"
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})


def test_the_models_of_the_docs_are_those_that_are_read():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", (ROOT / "docs" / "adding-a-model.md").read_text(), re.MULTILINE)
    assert {family for _, family in rows} == set(get_args(Family))
    for name, _ in rows:
        with pytest.raises(KeyError):  # it is known, and its sizes are missed
            parse_architecture({"architectures": [name]})


def test_the_table_of_methods_has_every_method_and_keys_that_exist():
    table = (ROOT / "docs" / "methods.md").read_text().partition("## Teachers")[0]
    lines = [line for line in table.splitlines() if line.startswith("| `") and not line.startswith("| `name`")]
    rows = [line.split("`")[1] for line in lines]
    configs = {config.model_fields["name"].default: config for config in OBJECTIVES}
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
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"{document.name} names {missing}"


def test_the_page_of_recipes_is_that_of_the_examples():
    made = recipe_gallery.page()
    assert made == (ROOT / "docs" / "recipes.md").read_text(), "python tools/recipe_gallery.py > docs/recipes.md"
    recipes = {path.relative_to(ROOT) for path in (ROOT / "examples").rglob("*.yaml")}
    assert all(f"](../{path})" in made for path in recipes)


def test_the_comments_of_a_recipe_are_taken_apart():
    text = "# yaml-language-server: x\n# One\n# two.\n#\n#   run \\\n#       this\n#\n# More.\noutput: here\n# end\n"
    assert recipe_gallery.comments(text) == ("One two.", ["run \\", "    this"])


def test_every_source_of_the_methods_has_its_reference():
    cited = set(re.findall(r"\b\d{4}\.\d{5}\b", (ROOT / "docs" / "methods.md").read_text()))
    references = (ROOT / "docs" / "references.md").read_text()
    assert cited and not [number for number in cited if f"arXiv:{number}" not in references]
    names = {config.model_fields["name"].default for config in OBJECTIVES}
    assert not [name for name in names if f"`{name}`" not in references]


def _texts(path: Path) -> list[str]:
    """Return the texts in a source file, those with values in them with `...` in place of each value."""
    if path.suffix != ".py":
        return path.read_text().splitlines()
    texts = []
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


def test_messages_on_the_page_of_troubles_are_those_of_the_code():
    sources = [*(ROOT / "megatron_hdpo").rglob("*.py"), *(ROOT / "examples" / "cluster").glob("*.sh")]
    texts = [text for path in sources for text in _texts(path)]
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs" / "trouble.md").read_text(), re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row) if " " in message]
    assert len(messages) >= 25
    unknown = [m for m in messages if not any(re.search(re.escape(m).replace(r"\.\.\.", ".*"), t) for t in texts)]
    assert not unknown
