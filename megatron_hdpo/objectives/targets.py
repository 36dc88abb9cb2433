"""The scorings behind a distillation target, and the target made of their answers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_hdpo.types.learning import DistillConfig, HiddenStates, Score, Scoring, ScoringKey
from megatron_hdpo.types.rollouts import Group, Sample, TopLogprobs

Place = tuple[int, str, int]
"""(index of the group, `student` or `privileged`, index of the sample)."""


def experts_of(place: Place, sample: Sample) -> np.ndarray | None:
    """The experts that sampled a rollout, where they saw what the policy sees: the student's prompt and this response.
    A privileged rollout's saw another prompt."""
    return sample.completion.routed_experts if place[1] == "student" else None


def own_scoring(place: Place, name: str, group: Group, sample: Sample, temperature: float) -> Scoring:
    """The policy's log-probs of a student rollout after the prompt that it answers, by the experts that sampled it."""
    return Scoring(
        (*place, name),
        group.prompt_ids,
        sample.completion.token_ids,
        "policy",
        temperature=temperature,
        routed_experts=experts_of(place, sample),
    )


def target_scorings(
    place: Place, student_context: np.ndarray, teacher_context: np.ndarray, sample: Sample, config: DistillConfig
) -> list[Scoring]:
    """What `target_of` needs: the teacher's distribution over the response after its own context, on the support that
    the config chooses; for support=student the policy's top k after the student's context first."""
    taught, response = (*place, "teacher"), sample.completion.token_ids
    if config.support == "full":
        return [Scoring(taught, teacher_context, response, "teacher", temperature=config.temperature, hidden=True)]
    if config.support == "teacher":
        k = config.top_k
        return [Scoring(taught, teacher_context, response, "teacher", top_k=k, temperature=config.temperature)]
    own = (*place, "support")
    return [
        Scoring(
            own,
            student_context,
            response,
            "policy",
            top_k=config.top_k,
            temperature=config.temperature,
            routed_experts=experts_of(place, sample),
        ),
        Scoring(taught, teacher_context, response, "teacher", temperature=config.temperature, at=own),
    ]


def target_of(
    place: Place, scores: Mapping[ScoringKey, Score], config: DistillConfig
) -> TopLogprobs | HiddenStates | None:
    """The target at a place, from the scores of `target_scorings`; None where there is no score."""
    score = scores.get((*place, "teacher"))
    if score is None:
        return None
    if config.support == "full":
        assert score.hidden_TH is not None
        return HiddenStates(score.hidden_TH)
    if config.support == "teacher":
        return score.top
    own = scores[(*place, "support")].top
    assert own is not None and score.at_logprobs_TK is not None
    return TopLogprobs(own.ids_TK, score.at_logprobs_TK)
