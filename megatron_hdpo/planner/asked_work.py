"""Work that an objective gives the trainer, found by asking the objective itself on made-up groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_hdpo.costs.workload import MODEL_ROLES, StudentScoring
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.registry import build_objective
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.planner.made_up import PromptsOfLength, random_score, random_top
from megatron_hdpo.types.learning import HiddenOnHost, ModelRole, Objective, Scoring
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, Group, Sample, TopKArrays

_TOKENS = 2  # of a made-up response


@dataclass(frozen=True)
class Steps:
    """Steps of a recipe. updates: per step. samples: per prompt. prompt, privileged: mean tokens of the two prompts."""

    count: int
    updates: int
    samples: int
    prompt: int
    privileged: int
    cliff_rate: float
    solved_rate: float


@dataclass(frozen=True)
class _Asked:
    """Answers of an objective at one step; `shares` has each group's share of a step's groups."""

    objective: Objective
    shares: list[float]
    groups: list[Group]
    wanted: list[int]
    scorings: list[Scoring]
    trained: list[int]
    targets: list[TopKArrays | HiddenOnHost | None]
    distilled: bool


def work_of(config: ObjectiveSettings, steps: Steps) -> dict[str, Any]:
    """Return fields of a Workload: privileged rollouts, scorings of the student's rollouts, and what is trained.

    Rollouts and training are those of the last step; scorings of student rollouts those of the first or the last step,
    whichever are more. In a mixed group half of the rollouts are right. Raises KeyError for an objective that is not
    registered.
    """
    deps = ObjectiveDeps(updates_per_step=steps.updates, prompts=PromptsOfLength(steps.privileged))
    first, last = (_ask(build_objective(config, deps), steps, step) for step in (0, steps.count - 1))
    made = [
        max((_student_scorings(asked, w, steps.samples) for asked in (first, last)), key=_passes) for w in MODEL_ROLES
    ]
    share = sum(s * count for s, count in zip(last.shares, last.trained, strict=True)) / steps.samples
    fields: dict[str, Any] = {
        "student_scorings": tuple(scoring for found in made for scoring in found),
        "trained_share": share,
        "distilled": last.distilled,
        "full": any(isinstance(target, HiddenOnHost) for target in last.targets),
        "top_k": max((t.ids_TK.shape[1] for t in last.targets if isinstance(t, TopKArrays)), default=0),
    }
    return fields | _privileged(last)


def _ask(objective: Objective, steps: Steps, step: int) -> _Asked:
    half = steps.samples // 2
    mixed = (1.0 - steps.cliff_rate - steps.solved_rate) / 2
    rights = {0: steps.cliff_rate, steps.samples: steps.solved_rate}
    kinds = [*rights.items(), (half, mixed), (steps.samples - half, mixed)]
    groups = [_group(g, right, steps) for g, (right, _) in enumerate(kinds)]
    wanted = [objective.privileged_rollouts_for(group, step) for group in groups]
    for group, count in zip(groups, wanted, strict=True):
        top_k = objective.privileged_top_logprobs
        group.privileged_samples = [_sample(steps.samples + s, True, top_k) for s in range(count)]
        group.privileged_prompt_ids = np.ones(steps.privileged, dtype=np.int32)
    groups = [objective.keep_privileged(group) for group in groups]
    objective.begin_step(step, groups)
    scorings = objective.scorings(groups)
    top_k_of = {scoring.key: scoring.top_k for scoring in scorings}
    rng = np.random.default_rng(0)
    scores = {scoring.key: random_score(scoring, top_k_of, rng) for scoring in scorings}
    examples = objective.examples(groups, scores, objective.totals(groups, scores))
    own = [e for e in examples if e.response_ids[0] < steps.samples and not e.inert]
    trained = [sum(int(e.prompt_ids[0]) == g for e in own) for g in range(len(groups))]
    targets = [example.target for example in examples]
    distilled = any(example.target is not None for example in own)
    return _Asked(
        objective=objective,
        shares=[share for _, share in kinds],
        groups=groups,
        wanted=wanted,
        scorings=scorings,
        trained=trained,
        targets=targets,
        distilled=distilled,
    )


def _student_scorings(asked: _Asked, role: ModelRole, samples: int) -> list[StudentScoring]:
    """Return the scorings of student rollouts by this model, one entry per prompt length."""
    passes: dict[int, float] = {}
    for scoring in asked.scorings:
        if scoring.key[1] == "student" and scoring.role == role:
            tokens = len(scoring.context_ids)
            passes[tokens] = passes.get(tokens, 0.0) + asked.shares[scoring.key[0]] / samples
    return [StudentScoring(role, count, tokens) for tokens, count in passes.items() if count]


def _passes(scorings: Sequence[StudentScoring]) -> float:
    return sum(scoring.per_rollout for scoring in scorings)


def _privileged(asked: _Asked) -> dict[str, Any]:
    """Return the fields of privileged rollouts; {} if there are none."""
    objective, most = asked.objective, max(asked.wanted)
    if not most:
        return {}
    scorers = {scoring.role for scoring in asked.scorings if scoring.key[1] == "privileged"}
    wrong = replace(
        asked.groups[0], privileged_samples=[_sample(0, False, objective.privileged_top_logprobs)], dropped={}
    )
    fields = {
        "privileged_rollouts": most,
        "privileged_share": sum(s * n for s, n in zip(asked.shares, asked.wanted, strict=True)) / most,
        "max_cliffs": objective.max_privileged_prompts,
        "scored_by_trainer": "teacher" in scorers,
        "student_support": "policy" in scorers,
    }
    return fields | ({"privileged_success": 1.0} if objective.keep_privileged(wrong).privileged_samples else {})


def _group(index: int, right: int, steps: Steps) -> Group:
    prompt_ids = np.full(steps.prompt, index, dtype=np.int32)
    samples = [_sample(s, s < right) for s in range(steps.samples)]
    return Group(Problem(f"plan/{index}", "plan", "", "1"), prompt_ids, samples)


def _sample(number: int, right: bool, top_k: int = 0) -> Sample:
    """Return a sample whose token ids are its number, with an answer in a box."""
    ids, zeros = np.full(_TOKENS, number, dtype=np.int32), np.zeros(_TOKENS, dtype=np.float32)
    top = random_top(_TOKENS, top_k, np.random.default_rng(number)) if top_k else None
    text = f"\\boxed{{{int(right)}}}"
    return Sample(Completion(ids, zeros, "stop", np.zeros(_TOKENS, dtype=np.int32), top), text, float(right))
