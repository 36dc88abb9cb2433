"""Warm-up: supervised steps on worked solutions, with and without the privileged prompt.

The cross-entropy of a response is the surrogate with advantage 1 and ratio 1 (its gradient is that of -log q), so the
trainer needs no third loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_hdpo.config.recipe import WarmupConfig
from megatron_hdpo.data.sft import SupervisedData, SupervisedExample
from megatron_hdpo.data.tasks import TaskConfig
from megatron_hdpo.tracking.formats import amount
from megatron_hdpo.training.load_data import load_warmup_data
from megatron_hdpo.training.run import Run
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.learning import Example, LossSpec, SurrogateConfig
from megatron_hdpo.types.problem import Problem


def warm_up(run: Run, config: WarmupConfig) -> None:
    """Train on worked solutions for `config.steps` steps; the optimizer is dropped afterwards.

    Raises DataError when a set of problems has no worked solution.
    """
    plain = _supervised_data(run, config.plain, privileged=False) if config.privileged_share < 1 else None
    privileged = _supervised_data(run, config.privileged, privileged=True) if config.privileged_share > 0 else None
    run.context.barrier("data of the warm-up loaded")
    run.rebuild_optimizer(config.optimizer, config.steps)
    spec = LossSpec(SurrogateConfig(), None, temperature=1.0)
    context, nll = run.context, 0.0
    with run.console.phase("warm-up", total=config.steps, unit="step") as phase:
        for step in range(config.steps):
            batch = _batch(plain, privileged, step, config)
            mine = batch[context.dp_rank :: context.dp_size]
            nll = run.policy.update([_example(example) for example in mine], spec)["train/nll"]
            phase.advance()
    run.console.print(
        f"warm-up: {amount(config.steps, 'step')}, negative log-likelihood {nll:.3f} nats per token at the end"
    )


def _supervised_data(run: Run, tasks: Sequence[TaskConfig], privileged: bool) -> SupervisedData:
    problems: Sequence[Problem] = run.data.train
    if tasks:
        problems = load_warmup_data(
            run.recipe, tasks, run.data.prompts.tokenizer, run.rewards, run.architecture.vocab_size
        ).train
    key = f"warmup.{'privileged' if privileged else 'plain'}" if tasks else "warmup on data.train"
    try:
        data = SupervisedData(
            problems,
            run.data.prompts,
            privileged_share=float(privileged),
            max_response_tokens=run.recipe.rollout.max_new_tokens,
            seed=run.recipe.seed,
        )
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    if data.left_out:
        skipped = amount(data.left_out, "problem")
        run.console.warn(f"{key}: skipped {skipped}: without a solution, or with one over the length limit")
    return data


def _batch(
    plain: SupervisedData | None, privileged: SupervisedData | None, step: int, config: WarmupConfig
) -> list[SupervisedExample]:
    """Return the privileged examples of a step, then the plain ones; the counts are the same at every step."""
    size = config.examples_per_step
    count = round(size * config.privileged_share)
    batch = privileged.batch(step, count) if privileged is not None and count else []
    return batch + (plain.batch(step, size - count) if plain is not None and size > count else [])


def _example(example: SupervisedExample) -> Example:
    """Return a worked solution as an example with advantage 1 at each token."""
    ones = np.ones(len(example.response_ids), dtype=np.float32)
    return Example(
        example.prompt_ids,
        example.response_ids,
        advantages_T=ones,
        surrogate_weights_T=ones,
        surrogate_count=len(ones),
        own_rollout=False,
    )
