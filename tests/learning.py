"""Runs of examples/digit_sums that the learning tests compare: a warm-up per seed, and variants that start from it.

The inverted filter (distil the privileged rollouts that FAILED) is no control: it was seen to teach about as well. Its
trajectories are wrong, its targets are not: at each position they are still the distribution of a teacher that has seen
the right solution.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "digit_sums" / "hdpo.yaml"
SEEDS = [int(seed) for seed in os.environ.get("MEGATRON_HDPO_LEARNING_SEEDS", "0 1").split()]
HARD = ("n6", "n7", "n8")
STEPS = 80

Metrics = Mapping[str, float]


def warm_up_all(root: Path) -> None:
    """Warmed-up runs of every seed under `root`, two at a time."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(warm_up, root), SEEDS))


def learn_all(warm: Path, root: Path, variants: Sequence[str]) -> list[dict[str, Metrics]]:
    """What `learn` returns for each seed, two at a time, with the evaluation of its warm-up as `warmed_up`."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(partial(learn, warm, root, variants, ()), SEEDS))
    return [{"warmed_up": last_metrics(warm / f"seed{s}"), **r} for s, r in zip(SEEDS, results, strict=True)]


def warm_up(root: Path, seed: int) -> None:
    """Train a model from nothing into `root`/seed<n>, on short sums and on copying what is shown."""
    from tools.make_tiny_model import make_tiny_model

    model = make_tiny_model(root / f"model{seed}", seed=seed)
    _run("warmed_up", seed, root / f"seed{seed}", [f"model.path={model}", "train.steps=0"])


def learn(warm: Path, root: Path, variants: Sequence[str], settings: Sequence[str], seed: int) -> dict[str, Metrics]:
    """Evaluation metrics after each variant, all from the same warmed-up weights. settings: further overrides of the
    recipe."""
    overrides = [f"model.path={warm / f'seed{seed}' / 'hf'}", "warmup.kind=none", f"train.steps={STEPS}"]
    overrides += ["evaluation.before=false", "checkpoint.export=false", *settings]
    return {variant: _run(variant, seed, root / f"{variant}{seed}", overrides) for variant in variants}


def _run(variant: str, seed: int, out: Path, overrides: Sequence[str]) -> Metrics:
    import torch

    from megatron_hdpo.config import load_recipe
    from megatron_hdpo.parallel.context import start, stop
    from megatron_hdpo.parallel.layout import ParallelConfig
    from megatron_hdpo.run import build_run
    from megatron_hdpo.train import train

    torch.set_num_threads(1)
    common = [f"output={out}", f"seed={seed}", "evaluation.every=null", "rollout.save=false"]
    recipe = load_recipe(RECIPE, [*common, *overrides])
    run = build_run(recipe, start(ParallelConfig(), "cpu", seed), objective=_objective(variant, recipe))
    if variant == "wrong_reference":
        run.rollouts.prompts = _WrongReference(run.data.prompts, run.data.train)
    train(run)
    run.close(failed=False)
    stop()
    return last_metrics(out)


def last_metrics(out: Path) -> Metrics:
    """Metrics of the last step of a run."""
    from megatron_hdpo.tracking.metrics import read_metrics

    return read_metrics(out)[-1]


def hard_pass_at_8(metrics: Metrics) -> float:
    """Mean pass@8 over the levels that the warm-up did not teach."""
    return statistics.mean(metrics[f"eval/{name}/pass@8"] for name in HARD)


def scores_of(results: Sequence[Mapping[str, Metrics]]) -> dict[str, list[float]]:
    """`hard_pass_at_8` of each variant, by seed; printed."""
    scores = {variant: [hard_pass_at_8(result[variant]) for result in results] for variant in results[0]}
    print({name: [round(score, 3) for score in values] for name, values in scores.items()})
    return scores


def check_lift(scores: Mapping[str, Sequence[float]], controls: Sequence[str]) -> None:
    """HDPO solves hard sums that its controls leave, on every seed."""
    assert max(scores["warmed_up"]) < 0.1, "the hard sums must be cliffs to begin with"
    for control in controls:
        margins = [h - c for h, c in zip(scores["hdpo"], scores[control], strict=True)]
        assert min(margins) > 0 and statistics.mean(margins) > 0.1, f"margin over {control}: {margins}"


class _WrongReference:
    """A prompt builder whose privileged prompts show the solution of another problem of the same length."""

    def __init__(self, prompts, problems):
        self.student, self.markers, self._prompts = prompts.student, prompts.markers, prompts
        by_level: dict = {}
        for problem in problems:
            by_level.setdefault(problem.level, []).append(problem)
        self._solutions = {
            problem.id: other.solution
            for members in by_level.values()
            for problem, other in zip(members, [*members[1:], members[0]], strict=True)
        }

    def privileged(self, problem):
        return self._prompts.privileged(replace(problem, solution=self._solutions[problem.id]))


def _objective(variant: str, recipe):
    from megatron_hdpo.objectives.hdpo import HDPO

    class Failures(HDPO):
        """The filter upside down: what is distilled are the privileged rollouts that failed."""

        def keep_privileged(self, group):
            group.privileged = [replace(s, reward=float(not self.filter.is_right(s))) for s in group.privileged]
            return super().keep_privileged(group)

    class ShuffledTargets(HDPO):
        """Right rollouts, but each token gets the target of another position of its response."""

        def examples(self, groups: Sequence, scores: Mapping, totals: Mapping):
            return [self._shuffled(example) for example in super().examples(groups, scores, totals)]

        @staticmethod
        def _shuffled(example):
            if example.target is None:
                return example
            order = np.random.default_rng(len(example.response_ids)).permutation(len(example.response_ids))
            target = replace(
                example.target,
                ids_TK=example.target.ids_TK[order],
                logprobs_TK=example.target.logprobs_TK[order],
            )
            return replace(example, target=target)

    kinds = {"shuffled_targets": ShuffledTargets, "wrong_reference": Failures}
    config = recipe.objective
    if variant in ("grpo", "warmed_up"):
        distill = config.distill.model_copy(update={"coefficient": 0.0})
        config = config.model_copy(update={"distill": distill})
    return kinds.get(variant, HDPO)(config, recipe.rollout.temperature, leakage=recipe.data.leakage)
