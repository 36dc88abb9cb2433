"""Loading of the recipe's data section into problems, prompts and tasks, with all checks of the data."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megatron_hdpo.data.cache import Origin, ProblemCache
from megatron_hdpo.data.cache_key import task_key
from megatron_hdpo.data.checked import CheckedProblems, ProblemChecker, question_hashes
from megatron_hdpo.data.config import DataConfig
from megatron_hdpo.data.order import ProblemOrder
from megatron_hdpo.data.prompts import PromptBuilder
from megatron_hdpo.data.tasks import Task
from megatron_hdpo.data.tasks.rows import question_key
from megatron_hdpo.data.text_tokens import TokenizerLike
from megatron_hdpo.rewards.config import RewardConfig
from megatron_hdpo.rewards.gold import GoldCache, check_golds
from megatron_hdpo.rewards.pool import RewardPool
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.load_report import LoadReport
from megatron_hdpo.types.problem import Problem

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedData:
    """The data of a run. Train and evaluation problems fit their prompts, have readable gold and do not overlap.

    origins: by task, whether its problems were checked at this load or read from the cache.
    """

    train: list[Problem]
    evaluation: list[Problem]
    tasks: dict[str, Task]
    prompts: PromptBuilder
    order: ProblemOrder
    report: LoadReport
    origins: dict[str, Origin]


def load(
    config: DataConfig,
    tokenizer: TokenizerLike,
    pool: RewardPool | None = None,
    privileged: bool = True,
    hints: bool = False,
    vocab_size: int | None = None,
) -> LoadedData:
    """Load and check all problems; those of files and datasets come from the cache once they have been checked.

    Any number of processes may load at the same time: one of them checks, the others wait for its result. pool: parses
    gold answers that are not in the cache; without one, a pool is started for that time only. privileged: prompts with
    the ground truth will be requested, so they must fit too. hints: prompts with hints will be requested, so their
    problem must fit. vocab_size: rows of the model's embedding, which the tokens of every prompt must have. Raises
    DataError for anything that cannot be used and may not be dropped, and when no problem is left.
    """
    prompts = PromptBuilder(tokenizer, config.prompts, vocab_size)
    with ExitStack() as stack:
        if pool is None:
            pool = stack.enter_context(RewardPool([], RewardConfig(workers=os.cpu_count())))
        check_all = partial(
            check_golds, checker=pool.check_golds, cache=GoldCache(config.cache_dir or default_cache_dir())
        )
        checker = ProblemChecker(prompts, check_all, privileged, hints)
        loaded = {
            task.task_name: _checked(task, checker, ProblemCache(problem_folder(config))) for task in config.tasks
        }
    report = LoadReport(notes=prompts.notes())
    for found, _ in loaded.values():
        report.merge(found.report)
    evaluation = [problem for task in config.evaluation for problem in loaded[task.task_name][0].problems]
    training = [loaded[task.task_name][0] for task in config.train]
    if config.decontaminate:
        train = _without_overlap(training, evaluation, report)
    else:
        train = [problem for found in training for problem in found.problems]
    _check_not_empty(config, train, evaluation, report)
    weights = {task.task_name: task.weight for task in config.train if task.weight is not None}
    sources = {name: origin for name, (_, origin) in loaded.items()}
    for name, origin in sources.items():
        _logger.info("%s: %s", name, origin)
    return LoadedData(
        train=train,
        evaluation=evaluation,
        tasks={task.task_name: task for task in config.tasks},
        prompts=prompts,
        order=ProblemOrder(train, weights, config.seed),
        report=report,
        origins=sources,
    )


def _checked(task: Task, checker: ProblemChecker, cache: ProblemCache) -> tuple[CheckedProblems, Origin]:
    key = task_key(task, checker)
    if key is None:
        return checker.check(task), Origin(file=None, fresh=True)
    return cache.get(task.task_name, key, partial(checker.check, task))


def _without_overlap(
    training: Sequence[CheckedProblems], evaluation: Sequence[Problem], report: LoadReport
) -> list[Problem]:
    """Return the training problems whose question is not evaluated on; hashes leave few questions to compare."""
    evaluated = {question_key(problem.question): problem.id for problem in evaluation}
    hashes = question_hashes(evaluation)
    kept = []
    for found in training:
        suspected = np.isin(found.question_hashes, hashes)
        for problem, suspect in zip(found.problems, suspected.tolist(), strict=True):
            twin = evaluated.get(question_key(problem.question)) if suspect else None
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


def problem_folder(config: DataConfig) -> Path:
    """Return the folder of the cache of checked problems."""
    return (config.cache_dir or default_cache_dir()) / "problems"


def default_cache_dir() -> Path:
    """Return the user's cache folder (XDG base directory specification)."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "megatron_hdpo"
    try:
        return Path.home() / ".cache" / "megatron_hdpo"
    except RuntimeError as error:  # a container's user id without an entry in passwd
        raise DataError(
            "data.cache_dir: this user has no home folder for the cache of problems: set data.cache_dir, HOME or "
            "XDG_CACHE_HOME"
        ) from error
