"""Start-up self-test: finds failures that are otherwise silent, before the first step.

(a) Engine and trainer agree on the log-probs of sampled tokens. (b) A teacher that gets the student's own prompt has
divergence 0 at every token. (c) The engine serves the weights of the version that it states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hdpo.health.config import SelfTestConfig
from megatron_hdpo.model.policy import Policy, share_examples
from megatron_hdpo.objectives.examples import own_scoring
from megatron_hdpo.types.errors import UserError
from megatron_hdpo.types.learning import (
    DivergenceConfig,
    Example,
    LossSpec,
    Scoring,
    SurrogateConfig,
)
from megatron_hdpo.types.rollouts import Group

FP8_LIMIT = 0.5
"""Mean |engine - trainer| allowed with FP8 products, which change log-probs of small models the most; wrong weights or
prompts differ by whole nats. tools/bench_fp8_emulation.py measures a model's own difference."""


class SelfTestError(UserError, RuntimeError):
    """A check of the self-test failed; the message says which one and by how much."""


@dataclass(frozen=True)
class SelfTestResult:
    """Measurements of the self-test.

    mean_difference, max_difference: mean and largest |log-prob difference| in nats. divergence: nats per token. tokens:
    sampled tokens compared.
    """

    mean_difference: float
    max_difference: float
    divergence: float
    tokens: int


@dataclass(frozen=True)
class Limit:
    """Mean |log-prob difference| allowed, in nats, and why so much. fp8: whether FP8 products explain differences."""

    nats: float
    reason: str
    fp8: bool = False

    def __str__(self) -> str:
        return f"at most {self.nats:g} is allowed: {self.reason}"


def logprob_limit(config: SelfTestConfig, exact: bool, fp8: str | None) -> Limit:
    """Return the limit of a run.

    exact: engine and trainer both compute in float32. fp8: the recipe's key that makes one of them round products to
    FP8; None without FP8.
    """
    if config.mean_logprob_difference is not None:
        return Limit(config.mean_logprob_difference, "self_test.mean_logprob_difference", fp8 is not None)
    if fp8 is not None:
        return Limit(FP8_LIMIT, f"{fp8} rounds the products of one side to FP8", fp8=True)
    if exact:
        return Limit(1e-3, "engine and trainer compute in float32")
    return Limit(0.05, "engine and trainer round to bfloat16 in different places")


def check_logprobs(policy: Policy, groups: Sequence[Group], temperature: float) -> tuple[float, float, int]:
    """Compare engine and trainer log-probs of the sampled tokens; return (mean, largest, tokens) of |difference|.

    The same on every rank.
    """
    scorings, engine = [], {}
    for g, group in enumerate(groups):
        for s, sample in enumerate(group.samples):
            engine[g, "student", s, "self-test"] = sample.completion.logprobs
            scorings.append(own_scoring((g, "student", s), "self-test", group, sample, temperature))
    scores = policy.score(scorings)
    differences = [np.abs(score.logprobs_T - engine[key]) for key, score in scores.items()]
    mine = np.concatenate(differences) if differences else np.zeros(0)
    everyone = policy.context.gather_objects((float(mine.sum()), float(mine.max(initial=0.0)), len(mine)))
    total = sum(part[0] for part in everyone)
    tokens = sum(part[2] for part in everyone)
    return total / max(tokens, 1), max(part[1] for part in everyone), tokens


def check_alignment(policy: Policy, groups: Sequence[Group]) -> float:
    """Return the mean divergence per token of a teacher that equals the student.

    The teacher's context is the student's prompt and its weights are the policy's, so the divergence is 0 up to
    rounding, unless targets and tokens are misaligned between scoring and loss. Gradients are computed and discarded;
    no weight changes.
    """
    # The bucket keeps all of the teacher's probability: with a renormalised top k an equal student is not at 0.
    distill = DivergenceConfig(
        coefficient=1.0, kind="jsd", tail="bucket", top_k=min(8, policy.architecture.vocab_size - 1)
    )
    scorings = [
        Scoring((g, "student", s, "self"), group.prompt_ids, sample.completion.token_ids, "policy", distill.top_k)
        for g, group in enumerate(groups)
        for s, sample in enumerate(group.samples)
    ]
    scores = policy.score(scorings)
    examples = [_self_example(scoring, scores[scoring.key].top) for scoring in scorings] if scores else None
    shared = share_examples(examples if policy.context.is_last_stage else None, policy.context)
    spec = LossSpec(SurrogateConfig(), distill, temperature=1.0)
    return policy.accumulate_gradients(shared, spec)["distill/divergence"]


def _self_example(scoring: Scoring, top: object) -> Example:
    length = len(scoring.response_ids)
    zeros = np.zeros(length, dtype=np.float32)
    return Example(
        scoring.context_ids,
        scoring.response_ids,
        advantages_T=zeros,
        surrogate_weights_T=zeros,
        distill_weights_T=np.ones(length, dtype=np.float32),
        distill_count=float(length),
        target=top,  # type: ignore[arg-type]
    )


def run_self_test(
    config: SelfTestConfig,
    policy: Policy,
    sample: Callable[[], list[Group]],
    sync: Callable[[float], None],
    version: int,
    limit: Limit,
    temperature: float,
) -> SelfTestResult:
    """Run the checks (a), (b) and (c); return their measurements.

    sample: samples a few prompts with the engine's current weights. sync(scale): pushes the policy's weights into the
    engine, its final norm multiplied by `scale`. version: of the engine's weights. Raises SelfTestError, on every rank,
    when a check fails.
    """
    groups = sample()
    _check_versions(groups, version)
    mean, largest, tokens = check_logprobs(policy, groups, temperature)
    if not mean <= limit.nats:
        raise SelfTestError(
            f"self-test (a): engine and trainer disagree on the log-probs of {tokens} sampled tokens by {mean:.3g} on "
            f"average ({limit}) and {largest:.3g} at worst: weights, prompts or precision differ"
        )
    divergence = check_alignment(policy, groups)
    if not abs(divergence) <= config.max_divergence:
        raise SelfTestError(
            f"self-test (b): a teacher with the student's own prompt has divergence {divergence:.3g} per token, "
            f"at most {config.max_divergence:g} is allowed: teacher and student tokens are misaligned"
        )
    _check_weights_arrive(policy, sample, sync, limit, mean, temperature)
    return SelfTestResult(mean, largest, divergence, tokens)


def _check_versions(groups: Sequence[Group], version: int) -> None:
    versions = {int(v) for g in groups for s in g.samples for v in np.unique(s.completion.weight_versions)}
    if versions - {version}:
        raise SelfTestError(f"self-test (c): the engine served weights of version {sorted(versions)}, not {version}")
    if not versions:
        raise SelfTestError("self-test: the engine returned no sample at all; see the logs of the ranks")


def _check_weights_arrive(
    policy: Policy,
    sample: Callable[[], list[Group]],
    sync: Callable[[float], None],
    limit: Limit,
    before: float,
    temperature: float,
) -> None:
    """Check that altered weights change the log-probs, and that the true weights restore them.

    before: the difference with the true weights. The change must be beyond the limit; with FP8, whose limit may be
    beyond the change, it must be twice the difference that was measured before it and is measured after it.
    """
    sync(0.5)
    altered, _, _ = check_logprobs(policy, sample(), temperature)
    sync(1.0)
    restored, _, _ = check_logprobs(policy, sample(), temperature)
    least = 2 * max(before, restored) if limit.fp8 else limit.nats
    if altered <= least:
        raise SelfTestError(
            f"self-test (c): the engine was given altered weights and its log-probs still agree with the trainer's "
            f"(difference {altered:.3g}): weight updates do not arrive"
        )
    if not restored <= limit.nats:
        raise SelfTestError(
            f"self-test (c): the engine was given the true weights again and its log-probs differ by {restored:.3g} "
            f"({limit}): it does not serve the weights of the version that it states"
        )
