"""Does HDPO teach what GRPO cannot reach? Two seeds, with controls that move the model without teaching it.
MEGATRON_HDPO_LEARNING_SEEDS="0 1 2" runs others.

A model of half a million parameters is warmed up on sums of 2 to 4 digits, and on copying the running totals of up to
8 digits when they are shown. Sums of 6, 7 and 8 digits are then cliffs. From the same weights: GRPO alone (lambda 0);
HDPO; HDPO with targets shuffled between positions; HDPO whose teacher is shown the solution of another problem.

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
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "digit_sums" / "hdpo.yaml"
SEEDS = [int(seed) for seed in os.environ.get("MEGATRON_HDPO_LEARNING_SEEDS", "0 1").split()]
VARIANTS = ("grpo", "hdpo", "shuffled_targets", "wrong_reference")
HARD = ("n6", "n7", "n8")
STEPS = 80


def learn(
    seed: int, folder: str, variants: Sequence[str] = VARIANTS, settings: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Evaluation metrics before (`warmed_up`) and after each variant, all from the same warmed-up weights. settings:
    further overrides of the recipe."""
    import torch

    from megatron_hdpo.config import load_recipe
    from megatron_hdpo.parallel.context import start, stop
    from megatron_hdpo.parallel.layout import ParallelConfig
    from megatron_hdpo.run import build_run
    from megatron_hdpo.tracking.metrics import read_metrics
    from megatron_hdpo.train import train
    from tools.make_tiny_model import make_tiny_model

    torch.set_num_threads(1)
    model = make_tiny_model(Path(folder) / "model", seed=seed)
    context = start(ParallelConfig(), "cpu", seed)
    results = {}
    for variant in ("warmed_up", *variants):
        out = Path(folder) / variant
        overrides = [f"output={out}", f"seed={seed}", "evaluation.every=null", "rollout.save=false"]
        if variant == "warmed_up":
            overrides += [f"model.path={model}", "train.steps=0"]
        else:
            overrides += [f"model.path={Path(folder) / 'warmed_up' / 'hf'}", "warmup.kind=none"]
            overrides += [f"train.steps={STEPS}", "evaluation.before=false", "checkpoint.export=false"]
        recipe = load_recipe(RECIPE, [*overrides, *settings])
        run = build_run(recipe, context, objective=_objective(variant, recipe))
        if variant == "wrong_reference":
            run.rollouts.prompts = _WrongReference(run.data.prompts, run.data.train)
        train(run)
        run.close(failed=False)
        results[variant] = read_metrics(out)[-1]
    stop()
    return results


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


def hard_pass_at_8(metrics: Mapping[str, float]) -> float:
    """Mean pass@8 over the levels that the warm-up did not teach."""
    return statistics.mean(metrics[f"eval/{name}/pass@8"] for name in HARD)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One process per seed, two at a time."""
    folders = [str(tmp_path_factory.mktemp(f"seed{seed}")) for seed in SEEDS]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return list(pool.map(learn, SEEDS, folders))


@pytest.mark.slow
def test_hdpo_lifts_what_grpo_and_the_controls_leave_low(results):
    scores = {v: [hard_pass_at_8(result[v]) for result in results] for v in ("warmed_up", *VARIANTS)}
    print({name: [round(score, 3) for score in values] for name, values in scores.items()})
    assert max(scores["warmed_up"]) < 0.1, "the hard sums must be cliffs to begin with"
    for control in ("grpo", "shuffled_targets", "wrong_reference"):
        margins = [h - c for h, c in zip(scores["hdpo"], scores[control], strict=True)]
        assert min(margins) > 0 and statistics.mean(margins) > 0.1, f"margin over {control}: {margins}"
