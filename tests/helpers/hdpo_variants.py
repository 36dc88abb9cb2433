"""HDPO with one part of it broken: controls of the learning tests, which a recipe names by this file's path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_hdpo.objectives.hdpo import HDPO
from megatron_hdpo.types.learning import Example, Score, ScoringKey
from megatron_hdpo.types.rollouts import Group


class Failures(HDPO):
    """The filter upside down: what is distilled are the privileged rollouts that failed."""

    def keep_privileged(self, group: Group) -> Group:
        group.privileged_samples = [
            replace(s, reward=float(not self.filter.is_right(s))) for s in group.privileged_samples
        ]
        return super().keep_privileged(group)


class ShuffledTargets(HDPO):
    """Right rollouts, but each token gets the target of another position of its response."""

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float]
    ) -> list[Example]:
        return [self._shuffled(example) for example in super().examples(groups, scores, totals)]

    @staticmethod
    def _shuffled(example: Example) -> Example:
        if example.target is None:
            return example
        order = np.random.default_rng(len(example.response_ids)).permutation(len(example.response_ids))
        target = replace(
            example.target, ids_TK=example.target.ids_TK[order], logprobs_TK=example.target.logprobs_TK[order]
        )
        return replace(example, target=target)
