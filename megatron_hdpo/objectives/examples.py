"""From samples to scorings, and from scores to training examples: the functions that methods share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_hdpo.types.learning import DivergenceConfig, Example, HiddenOnHost, Score, Scoring, ScoringKey
from megatron_hdpo.types.rollouts import Group, Sample, TopKArrays

SampleKey = tuple[int, str, int]
"""(index of the group, `student` or `privileged`, index of the sample)."""


def student_samples(groups: Sequence[Group]) -> Iterator[tuple[SampleKey, Group, Sample]]:
    """Yield every student sample with its key and group, group by group."""
    return _samples(groups, "student")


def privileged_samples(groups: Sequence[Group]) -> Iterator[tuple[SampleKey, Group, Sample]]:
    """Yield every privileged sample with its key and group, group by group."""
    return _samples(groups, "privileged")


def _samples(groups: Sequence[Group], kind: str) -> Iterator[tuple[SampleKey, Group, Sample]]:
    for g, group in enumerate(groups):
        for s, sample in enumerate(group.samples if kind == "student" else group.privileged_samples):
            yield (g, kind, s), group, sample


def is_masked(sample: Sample, overlong: str) -> bool:
    """Return whether the sample was cut at the length limit and the setting `overlong` masks such samples."""
    return overlong == "mask" and sample.finish_reason == "length"


def experts_of(key: SampleKey, sample: Sample) -> np.ndarray | None:
    """Return the engine's expert choices of a student sample; None for a privileged one (another prompt)."""
    return sample.completion.routed_experts if key[1] == "student" else None


def own_scoring(key: SampleKey, name: str, group: Group, sample: Sample, temperature: float) -> Scoring:
    """Return the scoring of a student sample by the policy, after the student's prompt, with the engine's experts."""
    return Scoring(
        (*key, name),
        group.prompt_ids,
        sample.completion.token_ids,
        "policy",
        temperature=temperature,
        routed_experts=experts_of(key, sample),
    )


def target_scorings(
    key: SampleKey, student_context: np.ndarray, teacher_context: np.ndarray, sample: Sample, config: DivergenceConfig
) -> list[Scoring]:
    """Return the scorings that `target_of` needs.

    The teacher scores the response after its own context (int32 [P]), on the support that the config chooses. With
    support=student the policy's top k after the student's context comes first.
    """
    taught, response = (*key, "teacher"), sample.completion.token_ids
    if config.support == "full":
        return [Scoring(taught, teacher_context, response, "teacher", temperature=config.temperature, hidden=True)]
    if config.support == "teacher":
        k = config.top_k
        return [Scoring(taught, teacher_context, response, "teacher", top_k=k, temperature=config.temperature)]
    own = (*key, "support")
    return [
        Scoring(
            own,
            student_context,
            response,
            "policy",
            top_k=config.top_k,
            temperature=config.temperature,
            routed_experts=experts_of(key, sample),
        ),
        Scoring(taught, teacher_context, response, "teacher", temperature=config.temperature, at=own),
    ]


def target_of(
    key: SampleKey, scores: Mapping[ScoringKey, Score], config: DivergenceConfig
) -> TopKArrays | HiddenOnHost | None:
    """Return the target of a sample from the scores of `target_scorings`; None if the teacher did not score it."""
    score = scores.get((*key, "teacher"))
    if score is None:
        return None
    if config.support == "full":
        assert score.hidden_TH is not None
        return HiddenOnHost(score.hidden_TH)
    if config.support == "teacher":
        return score.top
    own = scores[(*key, "support")].top
    assert own is not None and score.at_logprobs_TK is not None
    return TopKArrays(own.ids_TK, score.at_logprobs_TK)


def student_example(
    group: Group,
    sample: Sample,
    advantages: float | np.ndarray,
    *,
    weight: float = 1.0,
    count: float | None = None,
    old: Score | None = None,
    reference: Score | None = None,
) -> Example:
    """Return the surrogate example of a student sample.

    advantages: one for all tokens, or one each [T]. weight: of every token. count: what the sample adds to the
    normaliser, by default its tokens. old: the policy's score before the first update. reference: the reference's.
    """
    length = sample.length
    return Example(
        prompt_ids=group.prompt_ids,
        response_ids=sample.completion.token_ids,
        advantages_T=np.broadcast_to(np.asarray(advantages, dtype=np.float32), (length,)),
        surrogate_weights_T=np.full(length, weight, dtype=np.float32),
        surrogate_count=float(length) if count is None else count,
        old_logprobs_T=None if old is None else old.logprobs_T,
        rollout_logprobs_T=sample.completion.logprobs,
        reference_logprobs_T=None if reference is None else reference.logprobs_T,
        routed_experts=sample.completion.routed_experts,
    )


def distillation_example(group: Group, sample: Sample, target: TopKArrays | HiddenOnHost) -> Example:
    """Return the distillation example of a privileged sample: the student's prompt, the same response ids, the target.

    Raises ValueError if the target does not have one row per response token.
    """
    length = sample.length
    rows = len(target.hidden_TH if isinstance(target, HiddenOnHost) else target.ids_TK)
    if rows != length:
        raise ValueError(f"problem {group.problem.id}: target has {rows} rows for a response of {length} tokens")
    return Example(
        prompt_ids=group.prompt_ids,
        response_ids=sample.completion.token_ids,
        advantages_T=np.zeros(length, dtype=np.float32),
        surrogate_weights_T=np.zeros(length, dtype=np.float32),
        distill_weights_T=np.ones(length, dtype=np.float32),
        distill_count=float(length),
        target=target,
        own_rollout=False,
    )


def sample_distillation(
    key: SampleKey,
    group: Group,
    sample: Sample,
    target: TopKArrays | HiddenOnHost | None,
    scores: Mapping[ScoringKey, Score],
    weights_T: np.ndarray | None = None,
) -> Example:
    """Return the distillation example of a sample, with the log-probs that an importance cap needs.

    weights_T: float [T], by default 1. Raises ValueError without a target.
    """
    if target is None:
        raise ValueError(f"problem {group.problem.id}: there is no score for rollout {key[2]}")
    example, old = distillation_example(group, sample, target), scores.get((*key, "old"))
    return replace(
        example,
        distill_weights_T=example.distill_weights_T if weights_T is None else weights_T.astype(np.float32),
        old_logprobs_T=None if old is None else old.logprobs_T,
        rollout_logprobs_T=sample.completion.logprobs,
        routed_experts=experts_of(key, sample),
        own_rollout=key[1] == "student",
    )
