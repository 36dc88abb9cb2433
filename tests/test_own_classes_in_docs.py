"""The pages on objectives and tasks of one's own, followed letter by letter in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import results_of, run_world
from documents import ROOT, commands_on, files_of

from megatron_hdpo import cli
from megatron_hdpo.tracking.metrics import read_metrics

DOCUMENTS = {"adding-an-objective.md": "rejection", "adding-a-task.md": "divisors"}


def write_files(document: str, folder: Path) -> None:
    files = files_of(document)
    name = DOCUMENTS[document]
    assert list(files) == [f"my-lab/{name}.py", f"my-lab/{name}.yaml"]
    for file, text in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)


def follow(folder: str, commands: list[list[str]]) -> None:
    os.chdir(folder)
    for arguments in commands:
        cli.main(arguments)


@pytest.mark.long
@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_reader_who_follows_the_page_trains(document: str, tmp_path: Path) -> None:
    write_files(document, tmp_path)
    name = DOCUMENTS[document]
    commands = commands_on(document, "make-tiny-model")
    assert [arguments[0] for arguments in commands] == ["make-tiny-model", "check", "explain", "plan", "train"]
    ended = run_world(1, follow, str(tmp_path), commands)
    results_of(ended)
    (out,) = ended.stdout
    for said in ("the recipe is fine", "success_threshold" if name == "rejection" else "Largest number", "layouts fit"):
        assert said in out, said
    run = tmp_path / "runs" / name
    assert [line["step"] for line in read_metrics(run) if "rollout/samples" in line] == [1, 2]
    code = files_of(document)[f"my-lab/{name}.py"]
    assert (run / "code" / f"{name}.py").read_text() == code
    saved = yaml.safe_load((run / "recipe.yaml").read_text())
    section = saved["objective"] if name == "rejection" else saved["data"]["train"][0]
    assert section["name" if name == "rejection" else "kind"].endswith(f"my-lab/{name}.py:{name.capitalize()}")


@pytest.mark.long
def test_two_ranks_train_and_resume_but_not_with_changed_code(tmp_path: Path) -> None:
    """With both files in one recipe; the edit is of the one with the objective."""
    for document in DOCUMENTS:
        write_files(document, tmp_path)
    commands = commands_on("adding-an-objective.md", "make-tiny-model")
    task = "data.train=[{kind: my-lab/divisors.py:Divisors, largest: 9, size: 60}]"
    train = ["train", "my-lab/rejection.yaml", task, "warmup.steps=2"]
    results_of(run_world(1, follow, str(tmp_path), commands[:1]))
    results_of(run_world(2, follow, str(tmp_path), [train]))
    code = tmp_path / "my-lab" / "rejection.py"
    code.write_text(code.read_text() + "# edited\n")
    refused = run_world(2, follow, str(tmp_path), [[*train, "train.steps=3"]])
    assert refused.codes == [2, 2] and "my-lab/rejection.py:Rejection: the code has changed" in refused.text
    accepted = run_world(2, follow, str(tmp_path), [[*train, "train.steps=3", "--accept-changes"]])
    results_of(accepted)
    assert "the run goes on with changed code" in accepted.text and "resumed from step_00000002" in accepted.text
    copies = sorted(path.name for path in (tmp_path / "runs" / "rejection" / "code").iterdir())
    assert copies[0] == "divisors.py" and len(copies) == 3


def test_the_files_import_no_torch(tmp_path: Path) -> None:
    for document, name in DOCUMENTS.items():
        write_files(document, tmp_path)
        code = f"import sys; from megatron_hdpo.config import load_recipe; load_recipe('my-lab/{name}.yaml')"
        check = [sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"]
        subprocess.run(check, check=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
