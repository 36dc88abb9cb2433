"""Runs with several reward functions, those of docs/reward-functions.md as they are written there."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import yaml
from commands import Ended, results_of, run_command
from recipes import ROOT, Tree, small_recipe
from reward_service import free_port

from megatron_hdpo.sampling.saved import read_step
from megatron_hdpo.tracking.metrics import read_metrics

PAGE = (ROOT / "docs" / "reward-functions.md").read_text()
SECRET = "s3cr3t-value"
OF_THE_CLOCK = ("time", "health", "ranks", "perf", "memory")


def code_of_the_page(first_line: str) -> str:
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if code.startswith(first_line)]
    return code


@pytest.fixture(scope="module")
def brevity(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the page's service."""
    script, port = tmp_path_factory.mktemp("service") / "brevity.py", free_port()
    script.write_text(code_of_the_page("import sys"))
    process = subprocess.Popen([sys.executable, script, str(port)], stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except URLError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def recipe_of(model: Path, brevity: str, folder: Path) -> Tree:
    """A run of two steps with the page's list of functions."""
    (folder / "variety.py").write_text(code_of_the_page("def variety"))
    (text,) = re.findall(r"```yaml\n(reward:.*?)```", PAGE, re.DOTALL)
    functions = yaml.safe_load(text.replace("http://127.0.0.1:8000", brevity))["reward"]["functions"]
    tree = small_recipe(model, folder / "run")
    functions[1]["kind"] = f"{folder}/{functions[1]['kind']}"
    functions[1]["arguments"] = {"size": 1}  # pieces that repeat in short responses too
    functions[2] |= {"api_key": SECRET, "headers": {"X-Team": SECRET}}
    tree["reward"]["functions"] = functions
    tree["tracking"] = {"tensorboard": False}
    return tree


def run(command: str, tree: Tree, *overrides: str) -> Ended:
    path = Path(tree["output"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return run_command(command, str(path), *overrides)


@pytest.fixture(scope="module")
def whole(tiny_model: Path, brevity: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tree, Ended]:
    """A finished run of two steps."""
    tree = recipe_of(tiny_model, brevity, tmp_path_factory.mktemp("rewards"))
    ended = run("train", tree)
    results_of(ended)
    return tree, ended


def numbers(folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(folder)
    return [{k: v for k, v in line.items() if k.partition("/")[0] not in OF_THE_CLOCK} for line in lines]


def variety(text: str) -> float:
    return len(set(text)) / len(text) if text else 1.0


def test_metrics_and_rollouts_show_every_function(whole: tuple[Tree, Ended]) -> None:
    folder = Path(whole[0]["output"])
    lines = numbers(folder)
    for step in (1, 2):
        groups = read_step(folder / "rollouts", step)
        samples = [sample for group in groups for sample in group.samples]
        privileged = [sample for group in groups for sample in group.privileged_samples]
        assert len(samples) == 16
        for sample in samples + privileged:
            parts = sample.components
            assert parts.keys() == {"task", "variety", "brevity"} and sample.decided_by == "task"
            assert parts["variety"] == pytest.approx(variety(sample.text))
            assert parts["brevity"] == pytest.approx(1 - len(sample.text) / 4000)
            assert sample.reward == pytest.approx(parts["task"] + 0.1 * parts["variety"] + 0.5 * parts["brevity"])
            assert sample.correctness == parts["task"] and sample.feedback is None
        assert len({sample.components["variety"] for sample in samples}) > 1
        for name in ("task", "variety", "brevity"):
            assert lines[step][f"reward/{name}"] == pytest.approx(np.mean([s.components[name] for s in samples]))
            assert lines[step][f"reward/{name}/failed"] == 0
        cliffs = [all(sample.components["task"] < 1 for sample in group.samples) for group in groups]
        assert lines[step]["rollout/cliff_rate"] == np.mean(cliffs) and any(cliffs)
        assert lines[step]["rollout/reward_mean"] == pytest.approx(np.mean([s.reward for s in samples]))
    for line in (lines[0], lines[2]):
        assert line["eval/held_out/reward_mean"] > 0.5 >= line["eval/held_out/pass@1"]


def test_no_secret_is_written_and_the_function_is_kept(whole: tuple[Tree, Ended]) -> None:
    files = [path for path in Path(whole[0]["output"]).rglob("*") if path.is_file()]
    texts = [path.read_bytes() for path in files]
    assert SECRET.encode() not in b"".join(texts) and SECRET not in whole[1].text
    assert code_of_the_page("def variety").encode() in texts


def test_a_resume_changes_nothing(whole: tuple[Tree, Ended], tmp_path: Path) -> None:
    resumed = whole[0] | {"output": str(tmp_path / "run")}
    results_of(run("train", resumed, "train.steps=1"))
    results_of(run("train", resumed))
    first, second = numbers(tmp_path / "run"), numbers(Path(whole[0]["output"]))
    for line in first:  # the shorter run evaluates after its last step
        for name in [name for name in line if line["step"] == 1 and name.startswith("eval/")]:
            del line[name]
    assert first == second


def test_a_service_that_is_gone_is_refused_by_check_and_train(tiny_model: Path, brevity: str, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model, brevity, tmp_path)
    recipe["reward"]["functions"][2]["url"] = f"http://127.0.0.1:{free_port()}/judge"
    for command in ("check", "train"):
        ended = run(command, recipe)
        assert ended.codes == [2]
        assert re.search(r"reward\.functions: brevity: http://127\.0\.0\.1:\d+/health: no answer: ", ended.text)
        assert "Traceback" not in ended.text and "Unclosed" not in ended.text and "first prompt" not in ended.text
