"""vOPD: single-sample on-policy distillation with the value of a state as baseline.

arXiv 2605.07865. With r = ln p - ln q of the sampled token, the myopic value of a state is E_q[r] = -KL(q || p), so

    A = r + KL(q || p),        everything detached.

The KL is over the whole vocabulary, or of the two distributions renormalised on the student's top k, whatever the
sampled token is: any function of the state leaves the estimator unbiased. Whether it lowers the variance is an
empirical question; the second moment of the advantage is logged with and without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.objectives.examples import SampleKey
from megatron_hdpo.objectives.opd import SampledConfig, SampledDistillation
from megatron_hdpo.objectives.settings import RecipeContext
from megatron_hdpo.types.headline import Headline
from megatron_hdpo.types.learning import Score, Scoring, ScoringKey
from megatron_hdpo.types.rollouts import Group, Sample

_SECOND_MOMENT = Headline("vopd/second_moment", "2nd mom", "Second moment of the advantages", ".4f")


class BaselineConfig(BaseModel):
    """Baseline that is subtracted from the log-ratio."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["full", "top_k", "none"] = Field(
        "full",
        description="-KL(q || p) over the vocabulary, of both renormalised on the student's top k, or none (OPD).",
    )
    top_k: int = Field(100, ge=1, description="The k of kind=top_k.")


class VOPDConfig(SampledConfig):
    """On-policy distillation with the value of the state as baseline."""

    name: Literal["vopd"] = "vopd"
    baseline: BaselineConfig = Field(
        default_factory=BaselineConfig, description="What is subtracted from the log-ratio."
    )

    def errors(self, context: RecipeContext) -> Iterator[str]:
        """Yield why baseline.top_k is too large."""
        if self.baseline.kind == "top_k" and self.baseline.top_k > context.vocab_size:
            yield f"baseline.top_k: {self.baseline.top_k} exceeds the vocabulary of {context.vocab_size} tokens"


class VOPD(SampledDistillation):
    """Single-sample distillation with a baseline."""

    config: VOPDConfig

    def sides(self, key: SampleKey, group: Group, sample: Sample) -> tuple[Scoring, Scoring]:
        """Return the student's and the teacher's scoring; for the baseline one refers to the other."""
        student, teacher = super().sides(key, group, sample)
        if self.config.baseline.kind == "full":
            return replace(student, reverse_kl_to=teacher.key), replace(teacher, hidden=True)
        if self.config.baseline.kind == "top_k":
            return replace(student, top_k=self.config.baseline.top_k), replace(teacher, at=student.key)
        return student, teacher

    def baseline(self, key: SampleKey, scores: Mapping[ScoringKey, Score]) -> np.ndarray:
        """Return -KL(q || p), float64 [T], or 0 without a baseline."""
        student, teacher = scores[*key, "old"], scores[*key, "teacher"]
        if self.config.baseline.kind == "none":
            return np.zeros(())
        if self.config.baseline.kind == "full":
            assert student.reverse_kl_T is not None
            return -student.reverse_kl_T.astype(np.float64)
        assert student.top is not None and teacher.at_logprobs_TK is not None
        return -renormalised_kl(student.top.logprobs_TK, teacher.at_logprobs_TK)

    @property
    def headlines(self) -> Sequence[Headline]:
        """Return the headlines of sampled distillation, and the second moment of the advantages."""
        first, *rest = super().headlines
        return (first, _SECOND_MOMENT, *rest)

    def totals_metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Return the sampled KL, and the second moment of the advantage with and without the baseline, per token."""
        metrics = super().totals_metrics(totals)
        if count := totals["tokens"]:
            metrics["vopd/second_moment"] = totals["squared_less_baseline"] / count
            metrics["vopd/second_moment_without_baseline"] = totals["squared"] / count
        return metrics


def renormalised_kl(student_TK: np.ndarray, teacher_TK: np.ndarray) -> np.ndarray:
    """Return the KL, float64 [T], of two distributions renormalised on K tokens, from log-probs [T, K]."""
    lq, lp = (_normalised(values_TK.astype(np.float64)) for values_TK in (student_TK, teacher_TK))
    return (np.exp(lq) * (lq - lp)).sum(-1)


def _normalised(logprobs_TK: np.ndarray) -> np.ndarray:
    return logprobs_TK - np.logaddexp.reduce(logprobs_TK, axis=-1, keepdims=True)
