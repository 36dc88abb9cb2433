"""Let checkpoints answer the first held-out problem of a recipe, with plain `transformers`, and write the answers.

    python examples/quickstart/answers.py RECIPE OUT.json NAME=FOLDER [NAME=FOLDER ...]

Every checkpoint answers greedily. The file has the question, the right answer, and for each name the text and whether
it is right.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import _environment  # noqa: F401
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from megatron_hdpo.data.config import DataConfig
from megatron_hdpo.data.prompts import PromptBuilder, PromptTooLong
from megatron_hdpo.data.tasks import Task
from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.problem import Problem


def main() -> None:
    """Read the command line and write the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=FOLDER")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    recipe = yaml.safe_load(arguments.recipe.read_text(encoding="utf-8"))
    folders = dict(checkpoint.split("=", 1) for checkpoint in arguments.checkpoints)
    written = answers(recipe, folders)
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    partial.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    partial.replace(arguments.out)


def answers(recipe: dict[str, Any], folders: dict[str, str]) -> dict[str, Any]:
    """Return the question, its right answer, and each checkpoint's text. folders: checkpoint folder by name."""
    config = DataConfig.model_validate(recipe["data"])
    task = config.evaluation[0]
    tokenizer = AutoTokenizer.from_pretrained(next(iter(folders.values())))
    prompts = PromptBuilder(tokenizer, config.prompts)
    problem = _first_that_fits(task, prompts)
    ids = torch.as_tensor(prompts.student(problem)).long()[None]
    limit = recipe["rollout"]["max_new_tokens"]
    said = {}
    for name, folder in folders.items():
        print(f"{name} answers", flush=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False)
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        said[name] = {"text": text, "right": task.score(problem, text) == 1.0}
    return {"question": problem.question, "answer": problem.answer, "checkpoints": said}


def _first_that_fits(task: Task, prompts: PromptBuilder) -> Problem:
    """Return the first problem with a prompt that fits: the run's evaluation leaves out longer ones, too."""
    for problem in task.problems(LoadReport()):
        with suppress(PromptTooLong):
            prompts.student(problem)
            return problem
    raise SystemExit(f"no problem of the task {task.task_name} has a prompt of max_prompt_tokens or fewer")


if __name__ == "__main__":
    main()
