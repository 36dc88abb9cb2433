"""The work that each objective gives the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_hdpo.costs.errors import PlanError
from megatron_hdpo.costs.workload import StudentScoring, Weights
from megatron_hdpo.objectives.akl import AKLConfig
from megatron_hdpo.objectives.contrastive_opsd import ContrastiveOPSDConfig
from megatron_hdpo.objectives.distillation import DistillationConfig
from megatron_hdpo.objectives.grpo import GRPOConfig
from megatron_hdpo.objectives.hdpo import HDPOConfig
from megatron_hdpo.objectives.opd import OPDConfig, SampledConfig
from megatron_hdpo.objectives.opsd import OPSDConfig
from megatron_hdpo.objectives.paced import PACEDConfig
from megatron_hdpo.objectives.rlcsd import RLCSDConfig
from megatron_hdpo.objectives.rlsd import RLSDConfig
from megatron_hdpo.objectives.sdpo import SDPOConfig
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.objectives.srpo import SRPOConfig
from megatron_hdpo.types.learning import DistillConfig

# Which of a mixed group's rollouts are wrong, which a recipe cannot tell either: those that SRPO distils.
WRONG_IN_MIXED = 0.5


@dataclass(frozen=True)
class Steps:
    """What a recipe says of its steps: how many, and updates in each; tokens of the two prompts; shares of groups. A
    rollout has a right sibling in groups that are no cliffs, and a wrong one besides in mixed ones."""

    count: int
    updates: int
    prompt: int
    privileged: int
    cliff_rate: float
    solved_rate: float

    @property
    def mixed(self) -> float:
        """Share of groups with right and wrong rollouts."""
        return 1.0 - self.cliff_rate - self.solved_rate


def work_of(objective: ObjectiveSettings, steps: Steps) -> dict[str, Any]:
    """Fields of a Workload: what is sampled with the privileged prompt, what is scored by whom, and what is trained on.

    Of methods with two stages the second, unless the run ends before it. Raises PlanError for objectives that this does
    not know.
    """
    if isinstance(objective, SRPOConfig):
        return _routed(objective, steps)
    if isinstance(objective, HDPOConfig):
        return _advantages(objective, steps) | _privileged(objective)
    if isinstance(objective, GRPOConfig) and objective.name in ("grpo", "rlsd", "rlcsd"):
        return _advantages(objective, steps)
    if isinstance(objective, SampledConfig) and getattr(objective, "estimator", "single_sample") == "single_sample":
        return {
            "student_scorings": _asked(("policy", 1.0), ("teacher", 1.0), prompt=steps.prompt),
            "trained_share": 1.0,
        }
    if isinstance(objective, AKLConfig) and objective.tokens == "teacher":
        return _teacher_tokens(objective, objective.rollouts, 1.0) | {"privileged_success": 1.0}
    if isinstance(objective, PACEDConfig) and objective.switch_step >= steps.count:
        return _teacher_tokens(objective, objective.privileged.rollouts, steps.mixed)
    if isinstance(objective, DistillationConfig) and type(objective) in _SHARES:
        return _distillation(objective, steps)
    name = getattr(objective, "name", type(objective).__name__)
    raise PlanError(f"objective {name} is not planned: plan it as the method that is most like it")


# Of student rollouts, those that are distilled on.
_SHARES: dict[type[DistillationConfig], Callable[[Steps], float]] = {
    OPDConfig: lambda steps: 1.0,
    OPSDConfig: lambda steps: 1.0,
    AKLConfig: lambda steps: 1.0,
    SDPOConfig: lambda steps: 1.0 - steps.cliff_rate,
    ContrastiveOPSDConfig: lambda steps: steps.mixed,
    PACEDConfig: lambda steps: steps.mixed,
}


def _asked(*scorings: tuple[Weights, float], prompt: int) -> tuple[StudentScoring, ...]:
    return tuple(StudentScoring(weights, per_rollout, prompt) for weights, per_rollout in scorings if per_rollout)


def _advantages(objective: GRPOConfig, steps: Steps) -> dict[str, Any]:
    """Of methods that learn from advantages."""
    answer = isinstance(objective, RLSDConfig) and objective.evidence == "answer"
    share = steps.mixed if isinstance(objective, RLCSDConfig) else 1.0
    own: tuple[Weights, float] = ("policy", share if steps.updates > 1 else steps.mixed if answer else 0.0)
    made = _asked(own, ("reference", share * objective.needs_reference), prompt=steps.prompt)
    made += _asked(("teacher", steps.mixed * _contexts(objective)), prompt=steps.privileged)
    # A penalty has a gradient in groups without an advantage too.
    return {"student_scorings": made, "trained_share": share if objective.needs_reference else steps.mixed}


def _contexts(objective: GRPOConfig) -> int:
    """Prompts under which the teacher scores a rollout that has an advantage."""
    if isinstance(objective, RLSDConfig):
        return 1 if objective.evidence == "answer" else 2
    return 1 + objective.negatives if isinstance(objective, RLCSDConfig) else 0


def _routed(objective: SRPOConfig, steps: Steps) -> dict[str, Any]:
    """Of mixed groups, wrong rollouts are distilled and right ones learn from their advantage. Memory is planned as if
    all of them had targets."""
    wrong, fields = steps.mixed * WRONG_IN_MIXED, _advantages(objective, steps)
    made = _asked(("teacher", wrong), prompt=steps.privileged)
    made += _asked(("policy", wrong * (objective.distill.support == "student")), prompt=steps.prompt)
    fields["student_scorings"] += made
    return fields | {"distilled": True} | _support(objective.distill)


def _distillation(objective: DistillationConfig, steps: Steps) -> dict[str, Any]:
    """Of methods that distil on the student's rollouts."""
    whole = isinstance(objective, OPDConfig) and objective.estimator == "full"
    distill = objective.distill.model_copy(update={"support": "full"}) if whole else objective.distill
    share = _SHARES[type(objective)](steps)
    pairs, own_prompt = isinstance(objective, ContrastiveOPSDConfig), isinstance(objective, OPDConfig | AKLConfig)
    again = steps.updates > 1 and distill.importance_cap is not None
    made = _asked(("teacher", share * (2 if pairs else 1)), prompt=steps.prompt if own_prompt else steps.privileged)
    made += _asked(("policy", share * (int(distill.support == "student") + int(again))), prompt=steps.prompt)
    return {"student_scorings": made, "trained_share": share, "distilled": True} | _support(distill)


def _teacher_tokens(objective: DistillationConfig, rollouts: int, share: float) -> dict[str, Any]:
    """Of methods that distil on privileged rollouts alone, of that share of the prompts."""
    sampled = {"privileged_rollouts": rollouts, "privileged_share": share, "trained_share": 0.0}
    return sampled | {"student_support": objective.distill.support == "student"} | _support(objective.distill)


def _privileged(objective: HDPOConfig) -> dict[str, Any]:
    """HDPO's privileged rollouts and their targets; none without a weight."""
    if objective.distill.coefficient == 0:
        return {}
    return {
        "privileged_rollouts": objective.privileged.rollouts,
        "max_cliffs": objective.privileged.max_prompts_per_step,
        "scored_by_trainer": objective.logits_from == "trainer",
        "student_support": objective.distill.support == "student",
    } | _support(objective.distill)


def _support(distill: DistillConfig) -> dict[str, Any]:
    """What a target keeps of the teacher's distribution."""
    full = distill.support == "full"
    return {"full": full, "top_k": 0 if full else distill.top_k}
