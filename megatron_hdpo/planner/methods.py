"""The work that each objective gives the trainer."""

from __future__ import annotations

from typing import Any

from megatron_hdpo.objectives.akl import AKLConfig
from megatron_hdpo.objectives.contrastive_opsd import ContrastiveOPSDConfig
from megatron_hdpo.objectives.distillation import DistillationConfig
from megatron_hdpo.objectives.grpo import GRPOConfig
from megatron_hdpo.objectives.hdpo import HDPOConfig
from megatron_hdpo.objectives.opd import OPDConfig, SampledConfig
from megatron_hdpo.objectives.opsd import OPSDConfig
from megatron_hdpo.objectives.rlcsd import RLCSDConfig
from megatron_hdpo.objectives.rlsd import RLSDConfig
from megatron_hdpo.objectives.sdpo import SDPOConfig
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.planner.errors import PlanError
from megatron_hdpo.planner.workload import StudentScoring, Weights


def student_work(
    objective: ObjectiveSettings, updates: int, prompt: int, privileged: int, cliff_rate: float, solved_rate: float
) -> dict[str, Any]:
    """Fields of a Workload: what of the student's rollouts is scored by whom, and trained on.

    prompt, privileged: tokens of the prompts. A rollout has a right sibling in groups that are no cliffs, and a wrong
    one besides in mixed groups. Raises PlanError where the work of a method is not known here.
    """
    mixed = 1.0 - cliff_rate - solved_rate
    made: list[StudentScoring] = []

    def ask(weights: Weights, per_rollout: float, tokens: int = prompt) -> None:
        if per_rollout:
            made.append(StudentScoring(weights, per_rollout, tokens))

    if isinstance(objective, GRPOConfig):
        if objective.name not in ("grpo", "hdpo", "rlsd", "rlcsd"):
            raise PlanError(f"objective {objective.name} is not planned yet: plan it as hdpo or grpo")
        answer = isinstance(objective, RLSDConfig) and objective.evidence == "answer"
        ask("policy", 1.0 if updates > 1 else mixed if answer else 0.0)
        ask("reference", float(objective.needs_reference))
        ask("teacher", mixed * _contexts(objective), privileged)
        return {"student_scorings": tuple(made)}
    if isinstance(objective, SampledConfig) and getattr(objective, "estimator", "single_sample") == "single_sample":
        ask("policy", 1.0)
        ask("teacher", 1.0)
        return {"student_scorings": tuple(made), "trained_share": 1.0}
    if not isinstance(objective, DistillationConfig) or not _known(objective):
        name = getattr(objective, "name", type(objective).__name__)
        raise PlanError(f"objective {name} is not planned yet: plan it as hdpo or grpo")
    whole = isinstance(objective, OPDConfig) and objective.estimator == "full"
    support = "full" if whole else objective.distill.support
    pairs = isinstance(objective, ContrastiveOPSDConfig)
    share = mixed if pairs else 1.0 - cliff_rate if isinstance(objective, SDPOConfig) else 1.0
    own_prompt = isinstance(objective, OPDConfig | AKLConfig)
    ask("teacher", share * (2 if pairs else 1), prompt if own_prompt else privileged)
    again = updates > 1 and objective.distill.importance_cap is not None
    ask("policy", share * (int(support == "student") + int(again)))
    return {
        "student_scorings": tuple(made),
        "trained_share": share,
        "distilled": True,
        "full": support == "full",
        "top_k": 0 if support == "full" else objective.distill.top_k,
    }


def _contexts(objective: GRPOConfig) -> int:
    """Prompts under which the teacher scores a rollout that has an advantage."""
    if isinstance(objective, RLSDConfig):
        return 1 if objective.evidence == "answer" else 2
    return 1 + objective.negatives if isinstance(objective, RLCSDConfig) else 0


def _known(objective: DistillationConfig) -> bool:
    if isinstance(objective, AKLConfig):
        return objective.tokens == "student"
    return isinstance(objective, OPDConfig | OPSDConfig | SDPOConfig | ContrastiveOPSDConfig)


def privileged_work(objective: HDPOConfig) -> dict[str, Any]:
    """Fields of a Workload: HDPO's privileged rollouts and their targets."""
    support = objective.distill.support
    return {
        "privileged_rollouts": objective.privileged.rollouts,
        "max_cliffs": objective.privileged.max_prompts_per_step,
        "top_k": 0 if support == "full" else objective.distill.top_k,
        "scored_by_trainer": objective.logits_from == "trainer",
        "student_support": support == "student",
        "full": support == "full",
    }
