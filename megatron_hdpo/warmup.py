"""The warm-up: supervised steps on worked solutions, with and without the privileged prompt.

A response's cross-entropy is the surrogate with advantage 1 and ratio 1 (its gradient is that of -log q), so the trainer
needs no third loss.
"""

from __future__ import annotations

import numpy as np

from megatron_hdpo.config import WarmupConfig
from megatron_hdpo.data.sft import SupervisedData, SupervisedExample
from megatron_hdpo.objectives.interface import Example, LossSpec, SurrogateConfig
from megatron_hdpo.run import Run


def supervised(example: SupervisedExample) -> Example:
    """The training example of a worked solution: each of its tokens with advantage 1."""
    ones = np.ones(len(example.response_ids), dtype=np.float32)
    return Example(
        example.prompt_ids, example.response_ids, advantages_T=ones, surrogate_weights_T=ones, surrogate_count=len(ones)
    )


def warm_up(run: Run, config: WarmupConfig) -> None:
    """Train on worked solutions for `config.steps` steps; the optimizer is dropped afterwards.

    Raises DataError when no training problem has a worked solution.
    """
    problems = [p for p in run.data.train if config.tasks is None or p.task in config.tasks]
    data = SupervisedData(
        problems,
        run.data.prompts,
        config.privileged_share,
        max_response_tokens=run.recipe.rollout.max_new_tokens,
        seed=run.recipe.seed,
    )
    if data.left_out:
        run.console.warn(f"warm-up: {data.left_out} problems have no worked solution that fits, and are left out")
    run.rebuild_optimizer(config.optimizer, config.steps)
    spec = LossSpec(SurrogateConfig(), None, temperature=1.0)
    context, nll = run.context, 0.0
    with run.console.phase("warm-up", total=config.steps, unit="step") as phase:
        for step in range(config.steps):
            batch = data.batch(step, config.examples_per_step)
            metrics = run.policy.update([supervised(e) for e in batch[context.dp_rank :: context.dp_size]], spec)
            nll = metrics["train/nll"]
            phase.advance()
    run.console.print(f"warm-up: {config.steps} steps, negative log-likelihood {nll:.3f} nats per token at the end")
