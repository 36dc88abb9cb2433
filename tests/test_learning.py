"""Does HDPO teach what GRPO cannot reach? Three seeds, with controls that move the model without teaching it.

A model of half a million parameters is warmed up on sums of 2 to 4 digits, and on copying the running totals of up to
8 digits when they are shown. Sums of 6, 7 and 8 digits are then cliffs. From the same weights: GRPO alone; HDPO; HDPO
on the WRONG privileged rollouts (inverted filter); HDPO with targets shuffled between positions. Mere movement helps
length generalisation at this size, so the margin over the controls is the test, not the margin over GRPO alone.
"""

from __future__ import annotations

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
SEEDS = (0, 1, 2)
VARIANTS = ("grpo", "hdpo", "wrong_rollouts", "shuffled_targets")
HARD = ("n6", "n7", "n8")
STEPS = 60


def learn(seed: int, folder: str) -> dict[str, dict[str, float]]:
    """Evaluation metrics before (`warmed_up`) and after each variant, all from the same warmed-up weights."""
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
    for variant in ("warmed_up", *VARIANTS):
        out = Path(folder) / variant
        overrides = [f"output={out}", f"seed={seed}", "evaluation.every=null", "rollout.save=false"]
        if variant == "warmed_up":
            overrides += [f"model.path={model}", "train.steps=0"]
        else:
            overrides += [f"model.path={Path(folder) / 'warmed_up' / 'hf'}", "warmup.kind=none"]
            overrides += [f"train.steps={STEPS}", "evaluation.before=false", "checkpoint.export=false"]
        recipe = load_recipe(RECIPE, overrides)
        run = build_run(recipe, context, objective=_objective(variant, recipe))
        train(run)
        run.close(failed=False)
        results[variant] = read_metrics(out)[-1]
    stop()
    return results


def _objective(variant: str, recipe):
    from megatron_hdpo.objectives.hdpo import HDPO

    class WrongRollouts(HDPO):
        """The filter upside down: what is distilled are the privileged rollouts that failed."""

        def _right(self, sample):
            return sample.reward < self.config.privileged.success_threshold

        def is_cliff(self, group):
            return bool(group.samples) and all(sample.reward < 1.0 for sample in group.samples)

    class ShuffledTargets(HDPO):
        """Right rollouts, but each token gets the target of another position of its response."""

        def examples(self, groups: Sequence, scores: Mapping):
            return [self._shuffled(example) for example in super().examples(groups, scores)]

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

    kinds = {"hdpo": HDPO, "wrong_rollouts": WrongRollouts, "shuffled_targets": ShuffledTargets}
    config = recipe.objective
    if variant not in kinds:
        distill = config.distill.model_copy(update={"coefficient": 0.0})
        return HDPO(config.model_copy(update={"distill": distill}), recipe.rollout.temperature)
    return kinds[variant](
        config, recipe.rollout.temperature, leakage=recipe.data.leakage.model_copy(update={"enabled": False})
    )


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
    for control in ("grpo", "wrong_rollouts", "shuffled_targets"):
        margins = [h - c for h, c in zip(scores["hdpo"], scores[control], strict=True)]
        assert min(margins) > 0 and statistics.mean(margins) > 0.1, f"margin over {control}: {margins}"


@pytest.mark.slow
def test_the_cliff_rate_falls(results):
    for result in results:
        assert result["hdpo"]["rollout/cliff_rate"] < result["grpo"]["rollout/cliff_rate"] + 0.25
