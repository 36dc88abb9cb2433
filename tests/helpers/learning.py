"""Runs that the learning tests compare: a warm-up per seed, and variants that start from its weights.

The inverted filter (distil the privileged rollouts that FAILED) is no control: it was seen to teach about as well. Its
trajectories are wrong, its targets are not: at each position they are still the distribution of a teacher that has seen
the right solution.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_OWN = f"objective.name={Path(__file__).with_name('hdpo_variants.py')}"
VARIANTS = {
    "hdpo": [],
    "warmed_up": ["objective.distill.coefficient=0"],
    "grpo": ["objective.distill.coefficient=0"],
    "shuffled_targets": [f"{_OWN}:ShuffledTargets"],
    "wrong_reference": [f"{_OWN}:Failures"],
}
"""What a variant changes in the recipe of HDPO."""

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Study:
    """A recipe that the variants share.

    model: sizes of the tiny model. hard: evaluation sets of sums that the warm-up does not teach. steps: of
    reinforcement learning.
    """

    recipe: Path
    hard: tuple[str, ...]
    steps: int
    seeds: list[int]
    model: dict[str, Any] = field(default_factory=dict)


# What the quickstart shows, on one seed.
SHORT = Study(
    ROOT / "examples" / "quickstart" / "sums.yaml", ("cliffs",), 30, [0], {"layers": 3, "hidden": 64, "ffn": 192}
)
# Longer sums and a larger model; MEGATRON_HDPO_LEARNING_SEEDS names other seeds.
SEEDS = [int(seed) for seed in os.environ.get("MEGATRON_HDPO_LEARNING_SEEDS", "0 1").split()]
LONG = Study(ROOT / "examples" / "digit_sums" / "hdpo.yaml", ("n6", "n7", "n8"), 80, SEEDS)


def warm_up_all(study: Study, root: Path) -> None:
    """Write warmed-up runs of every seed under `root`, two at a time."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(warm_up, study, root), study.seeds))


def learn_all(study: Study, warm: Path, root: Path, variants: Sequence[str]) -> list[dict[str, Metrics]]:
    """Return metrics by variant for each seed, those of its warm-up as `warmed_up`; two runs at a time."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = {
            (seed, variant): pool.submit(learn, study, warm, root, (variant,), (), seed)
            for seed in study.seeds
            for variant in variants
        }
        found: dict[int, dict[str, Metrics]] = {
            seed: {"warmed_up": last_metrics(warm / f"seed{seed}")} for seed in study.seeds
        }
        for (seed, _), run in runs.items():
            found[seed] |= run.result()
    return list(found.values())


def warm_up(study: Study, root: Path, seed: int) -> None:
    """Train a model from nothing into `root`/seed<n>, on short sums and on copying what is shown."""
    from megatron_hdpo.model.tiny_model import make_tiny_model

    model = make_tiny_model(root / f"model{seed}", seed=seed, **study.model)
    _run(study, "warmed_up", seed, root / f"seed{seed}", [f"model.path={model}", "train.steps=0"])


def learn(
    study: Study, warm: Path, root: Path, variants: Sequence[str], settings: Sequence[str], seed: int
) -> dict[str, Metrics]:
    """Return evaluation metrics after each variant, all from the same warmed-up weights.

    settings: further overrides of the recipe.
    """
    overrides = [f"model.path={warm / f'seed{seed}' / 'hf'}", "warmup.kind=none", f"train.steps={study.steps}"]
    overrides += ["evaluation.before=false", "checkpoint.export=false", "checkpoint.every=1000", *settings]
    return {variant: _run(study, variant, seed, root / f"{variant}{seed}", overrides) for variant in variants}


def _run(study: Study, variant: str, seed: int, out: Path, overrides: Sequence[str]) -> Metrics:
    import torch

    from megatron_hdpo.config import load_recipe
    from megatron_hdpo.parallel.context import start, stop
    from megatron_hdpo.parallel.layout import ParallelConfig
    from megatron_hdpo.training.loop import train
    from megatron_hdpo.training.run import build_run

    torch.set_num_threads(1)
    common = [f"output={out}", f"seed={seed}", "evaluation.every=null", "rollout.save=false"]
    recipe = load_recipe(study.recipe, [*common, *VARIANTS[variant], *overrides])
    run = build_run(recipe, start(ParallelConfig(), "cpu", seed))
    if variant == "wrong_reference":
        run.coordinator.prompts = _WrongReference(run.data.prompts, run.data.train)
    train(run)
    run.close(failed=False)
    stop()
    return last_metrics(out)


def last_metrics(out: Path) -> Metrics:
    """Metrics of the last step of a run."""
    from megatron_hdpo.tracking.metrics import read_metrics

    return read_metrics(out)[-1]


def hard_pass_at_8(study: Study, metrics: Metrics) -> float:
    """Return the mean pass@8 over the sets that the warm-up did not teach."""
    return statistics.mean(metrics[f"eval/{name}/pass@8"] for name in study.hard)


def scores_of(study: Study, results: Sequence[Mapping[str, Metrics]]) -> dict[str, list[float]]:
    """Return `hard_pass_at_8` of each variant, by seed; print it too."""
    scores = {variant: [hard_pass_at_8(study, result[variant]) for result in results] for variant in results[0]}
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

    def privileged_prompt(self, problem):
        return self._prompts.privileged_prompt(replace(problem, solution=self._solutions[problem.id]))
