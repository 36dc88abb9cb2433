"""Every command in the documents exists, takes its arguments, and is run by a test or says why not.

A new command has to be entered in COVERED.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_hdpo import commands
from megatron_hdpo.cli import main, parser
from megatron_hdpo.config import RecipeError, load_recipe

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(
    r"(?:python[\d.]*|megatron_hdpo|make|torchrun|bash|sbatch|source|examples/\S+\.sh|\./\S+|\.venv\S*/bin/\S+"
    r"|pip|git|env|docker|enroot|srun)(?:\s|$)"
)
ASSIGNMENT = re.compile(r"[A-Z][A-Z_0-9]*=\S*")
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
BARE_NAMES = {"python", "torchrun", "megatron_hdpo", "sbatch", "srun", "git", "env"}


@dataclass(frozen=True)
class Tested:
    """A test runs the command, in a short form. by: text with which a test names it."""

    by: str


@dataclass(frozen=True)
class NotRun:
    """No test runs the command, for this reason."""

    why: str


GPU = NotRun("needs a GPU; its arguments are checked here")
INSTALLS = NotRun(
    "installs from an index, and no test asks a network; the Makefile's own steps are in install_environment"
)
CONTAINER = NotRun("needs a container engine")
MINUTES = NotRun("measures for minutes; its arguments are checked here")
COVERED = {
    "make quickstart": Tested("import quickstart"),
    "make compare": Tested("compare.py"),
    "make test": NotRun("starts the tests"),
    "make test-long": NotRun("starts the tests"),
    "make fast-test": NotRun("starts the tests"),
    "make fuzz": NotRun("takes hours"),
    "make setup": Tested("install_environment"),
    "make dev-setup": Tested("install_environment"),
    "make sglang-env": NotRun("a step of `make test`, before the tests"),
    "make rehearsal-env": Tested("install_environment"),
    "make docs": Tested('"mkdocs", "build", "--strict"'),
    "pip install": INSTALLS,
    "pip check": INSTALLS,
    "git clone": INSTALLS,
    "python -m venv": INSTALLS,
    "python -c": NotRun("shows on a machine with GPUs that a package loads"),
    "docker build": CONTAINER,
    "docker run": CONTAINER,
    "enroot import": CONTAINER,
    "source .venv/bin/activate": NotRun("a file of Python's own venv"),
    "megatron_hdpo --version": Tested('"--version"'),
    "megatron_hdpo init": Tested('"init"'),
    "megatron_hdpo make-tiny-model": Tested('"make-tiny-model"'),
    "megatron_hdpo prepare": Tested('"prepare"'),
    "megatron_hdpo sample": Tested('"sample"'),
    "megatron_hdpo chat": Tested('"chat"'),
    "megatron_hdpo compare": Tested('"compare"'),
    "megatron_hdpo convert": Tested('"convert"'),
    "megatron_hdpo verify-checkpoint": Tested('"verify-checkpoint"'),
    "megatron_hdpo verify-conversion": Tested('"verify-conversion"'),
    "megatron_hdpo completion": Tested('"completion"'),
    "megatron_hdpo train": Tested('"train", '),
    "megatron_hdpo evaluate": Tested('"evaluate"'),
    "megatron_hdpo check": Tested('"check", '),
    "megatron_hdpo plan": Tested('"plan", '),
    "megatron_hdpo explain": Tested('main(["explain"'),
    "megatron_hdpo report": Tested('"report"'),
    "megatron_hdpo doctor": Tested("doctor"),
    "tools/recipe_gallery.py": Tested("recipe_gallery.page()"),
    "tools/scaling_study.py": Tested("scaling_study"),
    "tools/resolve_platforms.py": Tested("resolve_platforms"),
    "tools/rehearse.py": Tested("tools/rehearse.py"),
    "tools/check_gpu.py": Tested("gpu_trials"),
    "tools/bench_divergence.py": MINUTES,
    "tools/bench_rehearsal.py": MINUTES,
    "tools/bench_fp8_emulation.py": MINUTES,
    "tools/bench_rollout.py": MINUTES,
    "tools/fault_table.py": Tested("fault_table.py"),
    "tools/bench_fleet.py": Tested("bench_fleet.measure("),
    "tools/bench_client.py": MINUTES,
    "tools/bench_rewards.py": Tested("bench_rewards.main("),
    "tools/compare_rewards.py": Tested("compare_rewards.main("),
    "tools/same_numbers.py": NotRun("compares two folders that hours of training have made"),
    "examples/compare/compare.py": Tested("compare.py"),
    "examples/cluster/one_node.sh": Tested("one_node.sh"),
    "examples/cluster/several_nodes.sh": Tested("several_nodes.sh"),
    "examples/cluster/slurm.sbatch": Tested("slurm.sbatch"),
    "examples/qwen2.5-math-1.5b/launch.sh": GPU,
}


def commands_of(document: Path) -> list[list[str]]:
    """Return the commands in a document's code blocks and in backticks, as words, without variables before them."""
    text = re.sub(r"\\\n\s*", " ", document.read_text())
    shell = "".join(code for language, code in FENCED.findall(text) if language in ("", "bash", "sh", "console"))
    text = FENCED.sub("", text)
    indented = re.findall(r"^(?: {4,}|\t)(.*)$", text, re.MULTILINE)
    lines = indented + shell.splitlines() + re.findall(r"`([^`\n]+)`", text)
    return [words for line in lines for words in _commands_in(line)]


def _commands_in(line: str) -> list[list[str]]:
    line = re.sub(r"(\s#\s| {3,}).*", "", line.strip().removeprefix("$ ")).removesuffix("&").strip()
    found = []
    for part in line.split("&&"):
        words = part.strip()
        while ASSIGNMENT.match(words):
            words = words.partition(" ")[2].strip()
        if COMMAND.match(words):
            found.append(shlex.split(re.sub(r" > \S+$| \[[^]]*\]", "", words)))
    return found


def program(words: list[str]) -> str:
    """Return what a command runs, as COVERED names it; the bare name where a text only names a program."""
    words = [re.sub(r"^(?:\.venv\S*/bin/)?(python|pip)[\d.]*$", r"\1", word) for word in words]
    if words[0] == "env" and "pip" in words:
        words = words[words.index("pip") :]
    if "megatron_hdpo" in words and words[0] != "docker":
        return " ".join(words[words.index("megatron_hdpo") :][:2])
    if words[:3] == ["python", "-m", "venv"]:
        return "python -m venv"
    if words[0] in ("make", "source", "pip", "git", "docker", "enroot") or words[:2] == ["python", "-c"]:
        return " ".join(words[:2])
    return next((word for word in words if re.fullmatch(r"(?:tools|examples)/.*\.(?:py|sh|sbatch)", word)), words[0])


def faults(words: list[str]) -> list[str]:
    """Return what is wrong with a command: files, make targets, arguments and recipe keys that do not exist."""
    wrong = [word for word in words if _is_own_file(word) and not (ROOT / word).exists()]
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        wrong += [f"make {word}" for word in words[1:] if "=" not in word and word not in targets]
    if "megatron_hdpo" in words:
        wrong += _not_parsed(words[words.index("megatron_hdpo") + 1 :])
    if (ROOT / program(words)).suffix == ".py":
        wrong += [word for word in words if word.startswith("--") and not _is_option(word, ROOT / program(words))]
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


def _is_option(word: str, tool: Path) -> bool:
    """Return whether the sources beside a tool name the option, with or without its dashes."""
    sources = "".join(path.read_text() for path in tool.parent.glob("*.py"))
    return word in ("--standalone", "--nproc-per-node") or bool(re.search(f'[" ](?:--)?{word[2:]}["=]', sources))


def _not_parsed(arguments: list[str]) -> list[str]:
    """Return the command line if the real parser refuses it; a command's bare name stands for the command."""
    line = "megatron_hdpo " + " ".join(arguments)
    if not arguments:
        return []
    try:
        parser().parse_args([*arguments, "--help"] if len(arguments) == 1 else arguments)
    except SystemExit as stopped:
        return [line] if stopped.code else []
    return []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_a_document_exist_and_take_their_arguments(document):
    wrong = {" ".join(words): found for words in commands_of(document) if (found := faults(words))}
    assert not wrong, f"{document.name}: {wrong}"


def test_every_command_is_run_by_a_test_or_says_why_not():
    found = {program(words) for document in DOCUMENTS for words in commands_of(document)} - BARE_NAMES
    assert found == set(COVERED), "enter new commands in COVERED, and take out those that are gone"


@pytest.mark.parametrize("name", [name for name, how in COVERED.items() if isinstance(how, Tested)])
def test_the_test_of_a_command_is_there(name):
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    assert any(COVERED[name].by in path.read_text() for path in tests)


def test_the_walk_sees_the_commands_and_their_faults(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Run `make a` or `no command`.\n\n    A=1 B=2 python -m megatron_hdpo fly   # says\n    make x && source y\n\n"
        "1. z\n\n        python tools/b.py [key=value ...] > c\n\n"
        "```bash\ntorchrun \\\n  d\n```\n\n```python\nmake()\n```\n"
    )
    assert sorted(commands_of(page)) == [
        ["make", "a"],
        ["make", "x"],
        ["python", "-m", "megatron_hdpo", "fly"],
        ["python", "tools/b.py"],
        ["source", "y"],
        ["torchrun", "d"],
    ]
    recipe = "examples/digit_sums/hdpo.yaml"
    assert faults(["python", "-m", "megatron_hdpo", "train", recipe, "train.steps=2"]) == []
    assert faults(["python", "-m", "megatron_hdpo", "fly"]) == ["megatron_hdpo fly"]
    assert faults(["megatron_hdpo", "plan", "RECIPE", "--gpuz", "h100"]) == ["megatron_hdpo plan RECIPE --gpuz h100"]
    assert faults(["python", "tools/no_such_tool.py"]) == ["tools/no_such_tool.py"]
    assert faults(["python", "tools/scaling_study.py", "--no-such"]) == ["--no-such"]
    assert faults(["make", "no-such-target"]) == ["make no-such-target"]
    assert "train.stepz" in faults(["examples/cluster/one_node.sh", recipe, "train.stepz=2"])[0]


def test_the_page_of_commands_has_every_command():
    named = {program(words) for words in commands_of(ROOT / "docs" / "commands.md")}
    assert {f"megatron_hdpo {command.name}" for command in commands.ALL} <= named


def test_explain_works_as_written(capsys):
    main(["explain", "rollout.temperature"])
    assert "temperature" in capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_with_commands_says_how_to_activate_the_environment(document):
    if any(words[0] in ("python", "torchrun") or "examples/" in words[0] for words in commands_of(document)):
        assert "source .venv/bin/activate" in document.read_text()


def test_the_readme_activates_the_environment_before_anything_that_needs_it():
    words = [" ".join(words) for words in commands_of(ROOT / "README.md")][:2]
    assert words == ["make quickstart", "source .venv/bin/activate"]
