"""Loading of the recipe's data section into problems, prompts and tasks, with all checks of the data."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_hdpo.data.config import DataConfig
from megatron_hdpo.data.order import ProblemOrder
from megatron_hdpo.data.prompts import Hint, PromptBuilder, PromptTooLong, TokenizerLike
from megatron_hdpo.data.tasks import Task
from megatron_hdpo.data.tasks.files import FileTaskBase
from megatron_hdpo.data.tasks.rows import question_key
from megatron_hdpo.rewards.config import RewardConfig
from megatron_hdpo.rewards.gold import GoldCache, check_golds
from megatron_hdpo.rewards.pool import RewardPool
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.problem import Problem

ENCODED_AT_LOAD = 100
"""Problems of each task that are encoded at load, to find a tokenizer that has no tokens for the text."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedData:
    """The data of a run. Train and evaluation problems fit their prompts, have readable gold and do not overlap."""

    train: list[Problem]
    evaluation: list[Problem]
    tasks: dict[str, Task]
    prompts: PromptBuilder
    order: ProblemOrder
    report: LoadReport


def load(
    config: DataConfig,
    tokenizer: TokenizerLike,
    pool: RewardPool | None = None,
    privileged: bool = True,
    hints: bool = False,
) -> LoadedData:
    """Load and check all problems.

    pool: parses gold answers that are not in the cache; without one, a pool is started for that time only. privileged:
    prompts with the ground truth will be requested, so they must fit too. hints: prompts with hints will be requested,
    so their problem must fit. Raises DataError for anything that cannot be used and may not be dropped, and when no
    problem is left.
    """
    report, prompts = LoadReport(), PromptBuilder(tokenizer, config.prompts)
    found = {task.task_name: task.problems(report) for task in config.tasks}
    found = _with_readable_gold(config, found, pool, report)
    found = {
        name: _that_fit(
            task=name, problems=problems, prompts=prompts, privileged=privileged, hints=hints, report=report
        )
        for name, problems in found.items()
    }
    evaluation = [problem for task in config.evaluation for problem in found[task.task_name]]
    train = [problem for task in config.train for problem in found[task.task_name]]
    if config.decontaminate:
        train = _without_overlap(train, evaluation, report)
    _check_not_empty(config, train, evaluation, report)
    weights = {task.task_name: task.weight for task in config.train if task.weight is not None}
    for line in report.lines():
        _logger.info("%s", line)
    return LoadedData(
        train=train,
        evaluation=evaluation,
        tasks={task.task_name: task for task in config.tasks},
        prompts=prompts,
        order=ProblemOrder(train, weights, config.seed),
        report=report,
    )


def _with_readable_gold(
    config: DataConfig, found: dict[str, list[Problem]], pool: RewardPool | None, report: LoadReport
) -> dict[str, list[Problem]]:
    checked = {
        task.task_name: task for task in config.tasks if isinstance(task, FileTaskBase) and task.needs_parsed_gold
    }
    answers = [problem.answer for name in checked for problem in found[name]]
    cache = GoldCache(config.cache_dir or default_cache_dir())
    with ExitStack() as stack:
        if pool is None:
            pool = stack.enter_context(RewardPool([], RewardConfig(workers=os.cpu_count())))
        verdicts = check_golds(answers, pool.check_golds, cache)
    kept: dict[str, list[Problem]] = {}
    for name, problems in found.items():
        kept[name] = []
        for problem in problems:
            error = verdicts[problem.answer].error if name in checked else None
            if error is None:
                kept[name].append(problem)
            else:
                message = f"{problem.metadata['source']}: {error}"
                report.reject(name, checked[name].on_bad_row, "gold answer not readable", message)
    return kept


def _that_fit(
    task: str, problems: Sequence[Problem], prompts: PromptBuilder, privileged: bool, hints: bool, report: LoadReport
) -> list[Problem]:
    kept = []
    for index, problem in enumerate(problems):
        if token := prompts.foreign_special_token(problem):
            report.drop(task, "special token in its text", f"{problem.id} contains {token}")
            continue
        try:
            prompts.check_length(problem, privileged, hints)
            if index < ENCODED_AT_LOAD:
                prompts.student(problem)
                if hints:
                    prompts.hinted(problem, Hint())
        except PromptTooLong as error:
            report.drop(task, "prompt too long", str(error))
            continue
        kept.append(problem)
    return kept


def _without_overlap(train: list[Problem], evaluation: list[Problem], report: LoadReport) -> list[Problem]:
    evaluated = {question_key(problem.question): problem.id for problem in evaluation}
    kept = []
    for problem in train:
        twin = evaluated.get(question_key(problem.question))
        if twin is None:
            kept.append(problem)
        else:
            report.drop(problem.task, "also evaluated on", f"{problem.id} is {twin}")
    return kept


def _check_not_empty(config: DataConfig, train: list[Problem], evaluation: list[Problem], report: LoadReport) -> None:
    """Count the problems that are kept; raise DataError for a task without any."""
    for problem in [*train, *evaluation]:
        report.kept[problem.task] = report.kept.get(problem.task, 0) + 1
    for task in config.tasks:
        if not report.kept.get(task.task_name):
            reasons = "; ".join(line for line in report.lines() if line.startswith(f"{task.task_name}: "))
            raise DataError(f"task {task.task_name!r} has no problem left ({reasons})")


def default_cache_dir() -> Path:
    """Return the user's cache folder (XDG base directory specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_hdpo"
