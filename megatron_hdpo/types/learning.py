"""Interface of an objective: groups of rollouts in, per-token numbers out; and the two losses of the trainer.

An objective is pure: it sees no process group, no model and no trainer. It asks for scorings (log-probs, a teacher's
top k) of responses under contexts, and turns groups and scores into examples. The trainer knows two losses only, a
clipped surrogate and a divergence to a target, and nothing of methods:

    L = sum_t w_t (S_t + kl_coefficient * K_t) / N_surrogate  +  coefficient * sum_t v_t D_t / N_distill

with w_t = Example.surrogate_weights_T, v_t = Example.distill_weights_T, and both normalisers summed over every example
of the optimizer step on every data-parallel replica (global token counts). K_t = (ln q - ln q_reference)^2 / 2 is there
for examples with reference log-probs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.types.divergences import DivergenceKind, DivergenceTail
from megatron_hdpo.types.headline import Headline
from megatron_hdpo.types.rollouts import Group, JudgedGroup, TopKArrays

if TYPE_CHECKING:
    import torch

ModelRole = Literal["policy", "teacher", "reference"]

ScoringKey = tuple[int, str, int, str]
"""(index of the group, `student` or `privileged`, index of the sample, name given by the objective)."""


@dataclass(frozen=True)
class Scoring:
    """Forward pass that an objective asks for: `response_ids` (int32 [T]) after `context_ids` (int32 [P]).

    role: which model scores. `policy` is the model before this step's update; `teacher` is the one of the recipe's
    teacher section; `reference` is the model before RL training started. top_k: the k largest log-probs of every
    position, 0 for none. at: the key of another scoring of the same response with top_k > 0; return this model's
    log-probs, after this context, of that scoring's ids. hidden: keep the input of the head (hidden states), from which
    a full-vocabulary target is made. reverse_kl_to: the key of another scoring with hidden=True; return KL(this model
    || that one) over the full vocabulary, per token. All at `temperature`. routed_experts: as in `Example`; for the
    policy alone.
    """

    key: ScoringKey
    context_ids: np.ndarray
    response_ids: np.ndarray
    role: ModelRole = "teacher"
    top_k: int = 0
    temperature: float = 1.0
    at: ScoringKey | None = None
    hidden: bool = False
    reverse_kl_to: ScoringKey | None = None
    routed_experts: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """Return the number of context and response tokens."""
        return len(self.context_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Score:
    """Answer to a Scoring, one row per response token: log-prob of the token and entropy, float32 [T].

    at_logprobs_TK: float32 [T, K] for `Scoring.at`, at the ids of that scoring's top. hidden_TH: [T, H] on the host, in
    the model's precision. reverse_kl_T: float32 [T].
    """

    logprobs_T: np.ndarray
    entropy_T: np.ndarray
    top: TopKArrays | None = None
    at_logprobs_TK: np.ndarray | None = None
    hidden_TH: torch.Tensor | None = None
    reverse_kl_T: np.ndarray | None = None


@dataclass(frozen=True)
class HiddenOnHost:
    """Full-vocabulary target: the hidden states [T, H] that the teacher's head reads.

    They are `Score.hidden_TH` of a scoring by the teacher; other models are not possible, because the loss has the
    teacher's head only. All targets of a step have the same type.
    """

    hidden_TH: torch.Tensor


@dataclass(frozen=True)
class Example:
    """Response to train on, with its per-token numbers (float32 [T], response tokens only).

    old_logprobs_T: denominators of the ratio; None takes the policy's own, detached (ratio 1, one update per step).
    rollout_logprobs_T: the engine's log-probs, for the mismatch metric and the importance cap. surrogate_count and
    distill_count: what this response adds to the two normalisers, also if its weights are zero (tokens for a token
    mean, 1 for a mean over sequences whose weights are 1/T). reference_logprobs_T: of the reference policy, for the KL
    penalty. routed_experts: `Completion.routed_experts` if the engine sampled this response after this prompt; the
    tokens then go to these experts. None: the router chooses. own_rollout: whether the student sampled this response
    after this prompt; `train/entropy` is over such responses.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    advantages_T: np.ndarray
    surrogate_weights_T: np.ndarray
    surrogate_count: float = 0.0
    old_logprobs_T: np.ndarray | None = None
    rollout_logprobs_T: np.ndarray | None = None
    distill_weights_T: np.ndarray | None = None
    distill_count: float = 0.0
    target: TopKArrays | HiddenOnHost | None = None
    reference_logprobs_T: np.ndarray | None = None
    routed_experts: np.ndarray | None = None
    own_rollout: bool = True

    @property
    def num_tokens(self) -> int:
        """Return the number of prompt and response tokens."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def inert(self) -> bool:
        """Return whether no token has a gradient: the example counts in the normalisers and need not be run."""
        surrogate = np.any(self.surrogate_weights_T * self.advantages_T)
        penalty = self.reference_logprobs_T is not None and np.any(self.surrogate_weights_T)
        distill = self.distill_weights_T is not None and np.any(self.distill_weights_T)
        return not (surrogate or penalty or distill)


class SurrogateConfig(BaseModel):
    """Configuration of the clipped policy-gradient surrogate (PPO's, with asymmetric and dual clips)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    ratio: Literal["token", "sequence"] = Field(
        "token",
        description="What is clipped: each token's probability ratio, or for all tokens of a response the geometric "
        "mean of their ratios (GSPO; its clips are some hundred times smaller). Where tokens weigh differently (an "
        "importance cap), a token's weight goes with its own gradient (GSPO-token).",
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="The ratio is clipped below at 1 - clip_low.")
    clip_high: float = Field(0.2, gt=0, description="The ratio is clipped above at 1 + clip_high.")
    dual_clip: float | None = Field(None, gt=1, description="Bound c on the loss -c*A of negative advantages.")
    importance_cap: float | None = Field(
        None, gt=0, description="Weight tokens by min(cap, trainer probability / engine probability), detached."
    )


class DivergenceConfig(BaseModel):
    """Configuration of the divergence between a target and the policy, and of its weight."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    coefficient: float = Field(0.1, ge=0, description="Weight of the divergence beside the surrogate (lambda).")
    kind: DivergenceKind = Field("jsd", description="Which divergence.")
    beta: float = Field(0.5, ge=0, le=1, description="Weight of the teacher's leg of the JSD; the skew of skew kinds.")
    tail: DivergenceTail = Field("outside", description="What becomes of the probability outside the teacher's top k.")
    support: Literal["teacher", "student", "full"] = Field(
        "teacher",
        description="Which tokens are compared: the teacher's top k, the student's top k before the update, or the "
        "whole vocabulary (no tail then; hidden states of the teacher are kept in host memory).",
    )
    top_k: int = Field(64, ge=1, description="Tokens of the distribution that are kept (k).")
    temperature: float = Field(1.0, gt=0, description="Temperature of both distributions.")
    clip: float | None = Field(None, gt=0, description="Upper bound of every vocabulary entry's summand (OPSD).")
    importance_cap: float | None = Field(
        None,
        gt=0,
        description="Weight tokens by min(cap, probability now / probability when sampled), detached (SDPO).",
    )

    def errors(self, vocab_size: int) -> Iterator[str]:
        """Yield why the divergence cannot be computed, as `key below the objective's section: reason`."""
        if self.support == "full":
            return
        if self.top_k > vocab_size:
            yield f"distill.top_k: {self.top_k} exceeds the vocabulary of {vocab_size} tokens"
        reverse = self.kind in ("reverse_kl", "akl") or (self.kind == "jsd" and self.beta == 1.0)
        if (reverse or (self.kind == "skew_reverse" and self.beta == 0.0)) and self.tail in ("outside", "literal"):
            yield (
                f"distill.kind: {self.kind} is infinite where the teacher is cut to zero; set "
                "objective.distill.tail=bucket"
            )
        if self.tail == "literal" and self.kind != "jsd":
            yield f"distill.tail: literal is defined for kind=jsd only, not {self.kind}"
        elif self.tail == "literal" and not (self.beta == 0.5 and self.clip is None):
            yield f"distill.tail: literal is defined for beta=0.5 without clip, not beta={self.beta}, clip={self.clip}"


@dataclass(frozen=True)
class LossSpec:
    """Loss of one optimizer step.

    temperature: sampling temperature of the surrogate's log-probs. kl_coefficient: weight of half the squared log-ratio
    to the reference policy (k2).
    """

    surrogate: SurrogateConfig
    distill: DivergenceConfig | None
    temperature: float
    kl_coefficient: float = 0.0


class Objective(Protocol):
    """Interface of a training method; most extend `objectives.base.BaseObjective` (docs/adding-an-objective.md)."""

    max_privileged_prompts: int | None
    """Largest number of groups per step that get privileged rollouts; None for no bound."""
    privileged_top_logprobs: int
    """The k of the top log-probs that the engine must return with privileged rollouts; 0 for none."""

    @property
    def loss(self) -> LossSpec:
        """Return the loss of the current step."""

    @property
    def headlines(self) -> Sequence[Headline]:
        """Return the metrics to show on the console besides reward, length and speed, the most important first.

        A terminal of 80 columns has space for three. Each should be measured in nearly every step.
        """

    def privileged_rollouts_for(self, group: Group, step: int) -> int:
        """Return the number of privileged rollouts of this group at this rollout step (counted from 0); 0 for none.

        Called as soon as the group's last student rollout is judged, on the rank that sampled it. With rollouts sampled
        ahead, it is called from another thread while an earlier step still trains.
        """

    def keep_privileged(self, group: Group) -> Group:
        """Return the group with the privileged samples that the objective uses; count the others in `group.dropped`."""

    def has_signal(self, group: Group) -> bool:
        """Return whether the group can change the policy; dynamic sampling replaces groups that cannot.

        Called on the rank that sampled the group.
        """

    def begin_step(self, step: int, groups: Sequence[JudgedGroup]) -> None:
        """Update schedules and statistics when the rollouts of a step are complete.

        Gets all groups of the step, without texts and tokens, on every rank; called before the methods below.
        """

    def scorings(self, groups: Sequence[Group]) -> list[Scoring]:
        """Return the forward passes needed before the update, for the groups of one data-parallel replica.

        Called on every rank of the replica; the engine's log-probs are on its last pipeline stage only.
        """

    def totals(self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score]) -> dict[str, float]:
        """Return this replica's part of the sums over the whole step that `examples` needs.

        For weights normalised over the batch, for example. Every replica must return the same names.
        """

    def totals_metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics that need the totals over all replicas; called on every rank."""

    def examples(
        self, groups: Sequence[Group], scores: Mapping[ScoringKey, Score], totals: Mapping[str, float]
    ) -> list[Example]:
        """Return the examples to train on: from the same groups, the scores, and the totals over all replicas."""

    def counts(self, groups: Sequence[Group]) -> dict[str, float]:
        """Return what `metrics` needs of the texts and tokens of some groups, as numbers to be added up over all.

        Called on every rank with the groups that it sampled.
        """

    def metrics(self, groups: Sequence[JudgedGroup], counts: Mapping[str, float]) -> dict[str, float]:
        """Return the method's metrics over all groups of the step (cliff rate, ...), which have no texts and tokens.

        counts: the sums of `counts` over all groups. Called on every rank.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint, as JSON values; {} for a method without state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
