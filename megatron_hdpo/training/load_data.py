"""The problems that a recipe asks for, checked for the prompts that its objective and warm-up request."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from megatron_hdpo.config.recipe import Recipe
from megatron_hdpo.data.load import LoadedData, load
from megatron_hdpo.data.tasks import TaskConfig
from megatron_hdpo.data.text_tokens import TokenizerLike
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.rewards.pool import RewardPool
from megatron_hdpo.sampling.saved import step_files
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.problem import Problem


def load_data(
    recipe: Recipe, tokenizer: TokenizerLike, rewards: RewardPool | None = None, vocab_size: int | None = None
) -> LoadedData:
    """Load the problems to train and to evaluate on. Raises DataError; see `data.load.load`."""
    privileged = recipe.objective.needs_privileged or recipe.warmup.kind == "sft"
    return load(recipe.data, tokenizer, rewards, privileged, bool(recipe.objective.hint_shows), vocab_size)


def check_enough(recipe: Recipe, data: LoadedData) -> None:
    """Raise DataError when a step would sample a problem twice: its copies would be the same rollouts."""
    if recipe.rollout.replay is None:
        data.order.check_size(recipe.rollout.prompts_per_step)


def check_replay(recipe: Recipe, taken: int) -> None:
    """Raise DataError when a step that is left has no saved rollouts. taken: steps that the run has taken."""
    folder, steps = recipe.rollout.replay, recipe.train.steps
    if folder is None:
        return
    for step in range(taken + 1, steps + 1):
        if not step_files(folder, step):
            raise DataError(
                f"rollout.replay: {folder} has no rollouts of step {step}, and train.steps is {steps}: name the "
                "rollouts folder of a run with at least as many steps"
            )


def check_same(data: LoadedData, context: ParallelContext) -> None:
    """Raise DataError on every rank when ranks hold different problems: files or caches of the nodes differ.

    Collective.
    """
    count = len(data.train) + len(data.evaluation)
    own = fingerprint([*data.train, *data.evaluation])
    context.barrier("data loaded")
    found = context.gather_objects((own, count))
    other = next((rank for rank, (its_own, _) in enumerate(found) if its_own != found[0][0]), None)
    if other is not None:
        raise DataError(
            f"data: rank 0 has {found[0][1]} problems, rank {other} has {found[other][1]}, and they are not the same: "
            "give every node the same files, or one data.cache_dir that all of them share"
        )


def fingerprint(problems: Sequence[Problem]) -> str:
    """Return the number of problems and a digest of their texts, in their order: "1000 problems, sha256 1f0c..."."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(f"{problem.id}\n{problem.question}\n{problem.answer}\n{problem.solution}\n".encode())
    return f"{len(problems)} problems, sha256 {digest.hexdigest()}"


def load_warmup_data(
    recipe: Recipe,
    tasks: Sequence[TaskConfig],
    tokenizer: TokenizerLike,
    rewards: RewardPool | None = None,
    vocab_size: int | None = None,
) -> LoadedData:
    """Load the problems of the warm-up's own tasks, without those that are evaluated on. Raises DataError."""
    data = recipe.data.model_copy(update={"train": list(tasks)})
    return load(data, tokenizer, rewards, vocab_size=vocab_size)
