"""One step of learning from a step's groups: plan, score, update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from megatron_hdpo.model.packing import split_by_tokens
from megatron_hdpo.model.policy import Policy, TrainingError, share_examples
from megatron_hdpo.objectives.interface import Example, Objective, Score, Scoring, ScoringKey
from megatron_hdpo.rollout.types import Group
from megatron_hdpo.teachers.teacher import Teacher
from megatron_hdpo.tracking.console import Console


class Learner:
    """Joins objective, teacher and policy. Every method is collective over all ranks."""

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        teacher: Teacher,
        console: Console,
        updates_per_step: int = 1,
        max_skipped_updates: int = 3,
    ) -> None:
        self.policy = policy
        self.objective = objective
        self.teacher = teacher
        self.console = console
        self.updates_per_step = updates_per_step
        self.max_skipped_updates = max_skipped_updates
        self._skipped_in_a_row = 0

    def learn(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Update the policy on the groups of the step (the same list on every rank); returns its metrics."""
        self.objective.begin_step(step, groups)
        mine = self._share(groups)
        examples = self._examples(mine)
        updates = []
        with self.console.phase("train", total=self._tokens(examples), unit="tok") as phase:
            for update in range(self.updates_per_step):
                part = examples[update :: self.updates_per_step]
                new = self.policy.update(part, self.objective.loss, phase.advance)
                self._stop_when_only_skipping(new)
                updates.append(new)
        return _of_step(updates)

    def _stop_when_only_skipping(self, metrics: dict[str, float]) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if metrics["train/skipped"] else 0
        if self._skipped_in_a_row > self.max_skipped_updates:
            raise TrainingError(
                f"{self._skipped_in_a_row} updates in a row had a gradient that is not finite (norm "
                f"{metrics['train/grad_norm']}): the weights are as before them. Lower optimizer.lr or "
                "objective.distill.coefficient, or look for the first such step in metrics.jsonl"
            )

    def _share(self, groups: Sequence[Group]) -> list[Group]:
        """The groups of this data-parallel replica: whole groups, token sums nearly equal between replicas."""
        costs = [sum(s.length + len(g.prompt_ids) for s in (*g.samples, *g.privileged)) for g in groups]
        context = self.policy.context
        return [groups[i] for i in split_by_tokens(costs, context.dp_size)[context.dp_rank]]

    def _examples(self, groups: Sequence[Group]) -> list[Example]:
        scorings = self.objective.scorings(groups)
        scores = self._scores([s for s in scorings if s.weights == "policy"], teacher=False)
        scores |= self._scores([s for s in scorings if s.weights == "teacher"], teacher=True)
        context = self.policy.context
        totals = self._totals(groups, scores)
        examples = self.objective.examples(groups, scores, totals) if context.is_last_stage else None
        return share_examples(examples, context)

    def _totals(self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score]) -> dict[str, float]:
        """The objective's sums, over all replicas. One rank speaks for each replica: one that has the scores."""
        context = self.policy.context
        speaks = context.is_last_stage and context.groups.tp.rank() == 0
        parts = context.gather_objects(self.objective.totals(groups, scores) if speaks else {})
        return {name: sum(part.get(name, 0.0) for part in parts) for part in parts for name in part}

    def _scores(self, scorings: Sequence[Scoring], teacher: bool) -> dict[ScoringKey, Score]:
        if not any(self.policy.context.gather_objects(bool(scorings))):
            return {}
        total = sum(len(s.context_ids) + len(s.response_ids) for s in scorings)
        with (
            self.console.phase("teacher" if teacher else "score", total=total, unit="tok") as phase,
            self.teacher.weights() if teacher else nullcontext(),
        ):
            return self.policy.score(scorings, phase.advance)

    @staticmethod
    def _tokens(examples: Sequence[Example]) -> int:
        return sum(example.num_tokens for example in examples if not example.inert)


def _of_step(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step from those of its updates: tokens add up, all else is the mean over those that reported it."""
    metrics = {}
    for name in dict.fromkeys(name for update in updates for name in update):
        values = [update[name] for update in updates if name in update]
        metrics[name] = sum(values) / (1 if name.endswith("/tokens") else len(values))
    return metrics
