"""One step of learning from a step's groups: score, make examples, update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_hdpo.checkpoint.store import LearnerState
from megatron_hdpo.costs.flops import FORWARD, FORWARD_AND_BACKWARD, forward_flops
from megatron_hdpo.model.packing import split_by_cost
from megatron_hdpo.model.policy import Policy, TrainingError, share_examples
from megatron_hdpo.model.scoring import ScoringContext, by_dependency
from megatron_hdpo.objectives.base import HintCounts, hint_metrics
from megatron_hdpo.sampling.delivery import deliver_to_replicas
from megatron_hdpo.sampling.step_rollouts import StepRollouts, gather_signals
from megatron_hdpo.teachers.teacher import PolicyTeacher, Teacher
from megatron_hdpo.tracking.console import Console
from megatron_hdpo.tracking.work import FlopCounter
from megatron_hdpo.types.learning import (
    Example,
    HiddenOnHost,
    ModelRole,
    Objective,
    Score,
    Scoring,
    ScoringKey,
)
from megatron_hdpo.types.metrics import reduce_metrics
from megatron_hdpo.types.rollouts import Group, GroupOutline

MOST_HINTS_CUT = 0.05
"""Share of a step's hints that may be cut to fit without a warning."""
_PHASES = {"policy": "score", "teacher": "teacher", "reference": "reference"}
Answers = dict[ScoringKey, Score]
Heads = dict[ModelRole, Tensor]


class Learner:
    """Joins objective, teacher and policy. Every method is collective over all ranks.

    reference: the model before RL training started, for objectives with a KL penalty.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        teacher: Teacher,
        console: Console,
        updates_per_step: int = 1,
        max_skipped_updates: int = 3,
        reference: Teacher | None = None,
    ) -> None:
        self.policy = policy
        self.objective = objective
        self.teacher = teacher
        self.reference = reference
        self.console = console
        self.updates_per_step = updates_per_step
        self.max_skipped_updates = max_skipped_updates
        self.work = FlopCounter()
        self._skipped_in_a_row = 0
        self._said_of_hints = False

    def learn(self, rollouts: StepRollouts, step: int) -> dict[str, float]:
        """Update the policy on the groups of a step and return the step's metrics.

        Raises TrainingError when more than `max_skipped_updates` updates in a row
        had a gradient that is not finite.
        """
        self.objective.begin_step(step, rollouts.outlines)
        examples, teacher_head, metrics = self._plan(self._share(rollouts))
        self._watch_hints(metrics, step)
        self.work.trained(self.policy.architecture, examples)
        updates = []
        with self.console.phase("train", total=self._tokens(examples), unit="token") as phase:
            for update in range(self.updates_per_step):
                part = examples[update :: self.updates_per_step]
                another = update + 1 < self.updates_per_step and not self.teacher.follows_updates
                new = self.policy.update(part, self.objective.loss, phase.advance, teacher_head, another)
                self._watch_skipped(new, step)
                if not new["train/skipped"]:
                    self.teacher.after_update()
                updates.append(new)
        self.teacher.after_step()
        return reduce_metrics(updates) | metrics

    def state_dict(self) -> LearnerState:
        """Return the state of objective and teacher for a checkpoint."""
        state = self.teacher.state_dict()
        teacher = {"kind": self.teacher.kind, "values": state.values, "weights": state.weights is not None}
        objective = {"class": type(self.objective).__name__, "state": self.objective.state_dict()}
        return LearnerState({"objective": objective, "teacher": teacher}, state.weights)

    def load_state_dict(self, memory: LearnerState) -> None:
        """Restore objective and teacher state.

        If the recipe's objective or teacher kind changed, that state is reset: the objective starts without one, the
        teacher from the policy's current weights.
        """
        objective, teacher = memory.values.get("objective", {}), memory.values.get("teacher", {})
        if objective.get("class") == type(self.objective).__name__:
            self.objective.load_state_dict(objective["state"])
        if teacher.get("kind") == self.teacher.kind:
            self.teacher.load_state_dict(teacher["values"], memory.weights)

    def _watch_skipped(self, metrics: dict[str, float], step: int) -> None:
        """Report an update that was skipped; raise TrainingError after too many in a row."""
        if not metrics["train/skipped"]:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        self.console.warn(f"step {step + 1}: an update was skipped, its gradient norm is {metrics['train/grad_norm']}")
        if self._skipped_in_a_row > self.max_skipped_updates:
            raise TrainingError(
                f"{self._skipped_in_a_row} updates in a row had a gradient that is not finite (norm "
                f"{metrics['train/grad_norm']}) and were skipped. Lower optimizer.lr or "
                "objective.distill.coefficient, or look for the first such step in metrics.jsonl"
            )

    def _watch_hints(self, metrics: Mapping[str, float], step: int) -> None:
        """Warn at the first step with many hints that did not fit."""
        share = metrics.get("hint/cut_share", 0.0)
        if share > MOST_HINTS_CUT and not self._said_of_hints:
            self._said_of_hints = True
            self.console.warn(
                f"step {step + 1}: {share:.0%} of the hints were too long and were cut, by "
                f"{metrics['hint/lost_tokens']:,.0f} tokens together: the teacher reads the rest. Raise "
                "data.prompts.max_privileged_tokens; hint/cut_share tells of later steps"
            )

    def _share(self, rollouts: StepRollouts) -> list[Group]:
        """Return the groups of this data-parallel replica: whole groups, with nearly equal FLOPs for all replicas."""
        context = self.policy.context
        signals = gather_signals(rollouts, self.objective, context)
        costs = list(map(self._cost, rollouts.outlines, signals))
        return deliver_to_replicas(rollouts, split_by_cost(costs, context.dp_size), context)

    def _cost(self, group: GroupOutline, has_signal: bool) -> float:
        """Return the most FLOPs that a group may need: scoring, and training if it can change the policy."""
        passes = FORWARD + (FORWARD_AND_BACKWARD if has_signal else 0)
        sequences = [(group.prompt_length + s.length, s.length) for s in (*group.samples, *group.privileged_samples)]
        return passes * forward_flops(self.policy.architecture, sequences)

    def _plan(self, groups: Sequence[Group]) -> tuple[list[Example], Tensor | None, dict[str, float]]:
        """Return this replica's examples, the head of a full-vocabulary teacher, and the objective's metrics.

        The head is the one that reads the targets' hidden states, None where no example needs it. Scores not referenced
        by an example are freed here, before the update allocates memory.
        """
        scores, heads = self._scores(self.objective.scorings(groups))
        totals = self._totals(groups, scores)
        context = self.policy.context
        made = self.objective.examples(groups, scores, totals) if context.is_last_stage else None
        examples = share_examples(made, context)
        needed = any(isinstance(example.target, HiddenOnHost) for example in examples)
        metrics = self.objective.totals_metrics(totals) | hint_metrics(totals)
        return examples, heads.get("teacher") if needed else None, metrics

    def _totals(self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score]) -> dict[str, float]:
        """Return the objective's sums and counts of hints over all replicas; one rank of each replica contributes."""
        context = self.policy.context
        contributes = context.is_last_stage and context.groups.tp.rank() == context.groups.cp.rank() == 0
        own: dict[str, float] = {}
        if contributes:
            hints = getattr(self.objective, "hint_counts", HintCounts())  # an objective may have another base class
            own = self.objective.totals(groups, scores) | hints.totals()
        parts = context.gather_objects(own)
        return {name: sum(part.get(name, 0.0) for part in parts) for part in parts for name in part}

    def _scores(self, scorings: Sequence[Scoring]) -> tuple[Answers, Heads]:
        """Return the scores wave by wave, and the heads for hidden states; all replicas run the same waves."""
        waves = by_dependency(scorings)
        everywhere = sorted({wave for waves in self.policy.context.gather_objects(list(waves)) for wave in waves})
        asked = {scoring.key: scoring for scoring in scorings}
        scores: Answers = {}
        heads: Heads = {}
        for wave in everywhere:
            answered = ScoringContext(asked, scores, heads)
            new, head = self._wave(waves.get(wave, []), wave[1], answered)
            scores |= new
            heads |= {} if head is None else {wave[1]: head}
        return scores, heads

    def _wave(
        self, scorings: Sequence[Scoring], weights: ModelRole, answered: ScoringContext
    ) -> tuple[Answers, Tensor | None]:
        total = sum(len(s.context_ids) + len(s.response_ids) for s in scorings)
        with (
            self.console.phase(_PHASES[weights], total=total, unit="token") as phase,
            self._holder(weights).scorer() as scorer,
        ):
            scores = scorer.score(scorings, phase.advance, answered)
            self.work.scored(scorer.architecture, scorings)
            # A copy: the update changes the policy's own head, and moves the teacher's weights off the device.
            keeps = self.policy.context.is_last_stage and any(s.hidden for s in scorings)
            return scores, scorer.head_copy(self.policy.head_rows) if keeps else None

    def _holder(self, weights: ModelRole) -> Teacher:
        if weights == "policy":
            return PolicyTeacher(self.policy)
        if weights == "teacher":
            return self.teacher
        if self.reference is None:
            raise ValueError("the objective asks for scores of the reference policy, but its needs_reference is False")
        return self.reference

    @staticmethod
    def _tokens(examples: Sequence[Example]) -> int:
        return sum(example.num_tokens for example in examples if not example.inert)
