"""Recipe section `rollout`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.rollout.sglang.config import SGLangConfig
from megatron_hdpo.types.rollouts import SamplingParams


class EmbeddedEngineConfig(BaseModel):
    """Size and precision of the embedded engine."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of the engine's weights, activations and key-value cache. auto: that of the model "
        "(model.dtype), so that engine and trainer agree on log-probs.",
    )
    max_batch_sequences: int = Field(64, ge=1, description="Most samples that decode together.")
    max_batch_tokens: int = Field(
        262_144,
        ge=1,
        description="Bound of the key-value cache in tokens: samples decoding together times the longest prompt plus "
        "max_new_tokens among them.",
    )
    prefill_tokens: int = Field(
        8_192, ge=1, description="Prompt tokens, padding included, in one prefill pass; a longer prompt goes alone."
    )
    refill_fraction: float = Field(
        0.25, ge=0, le=1, description="Share of the slots that must be free before waiting requests are admitted."
    )
    vocab_size: int | None = Field(
        None, ge=1, description="Ids from here on are never sampled; for models whose vocabulary is padded."
    )


class RolloutConfig(BaseModel):
    """Sampling of a step's rollouts. The privileged rollouts of a step use the same settings."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    engine: Literal["embedded", "sglang"] = Field("embedded", description="The engine that samples rollouts.")
    embedded: EmbeddedEngineConfig = Field(
        default_factory=EmbeddedEngineConfig, description="The engine on every rank's own device."
    )
    sglang: SGLangConfig = Field(default_factory=SGLangConfig, description="Stock SGLang servers.")
    prompts_per_step: int = Field(32, ge=1, description="Problems per step.")
    samples_per_prompt: int = Field(16, ge=1, description="Rollouts per problem (the group size G).")
    max_new_tokens: int = Field(2048, ge=1, description="Longest response in tokens.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; the surrogate's log-probs use it too.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling; below 1 the importance ratios are biased.")
    top_k: int | None = Field(None, ge=1, description="Sample from the k likeliest tokens; biases the ratios too.")
    max_retries: int = Field(2, ge=0, description="Retries of a failed generation before it is dropped and counted.")
    max_failed_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="If a larger share of a step's rollouts failed and was dropped, the run warns, with the most "
        "frequent error.",
    )
    max_empty_steps: int = Field(
        3, ge=1, description="Steps in a row of which every rollout failed before the run stops, with the reason."
    )
    overlap_privileged: bool = Field(
        True,
        description="Request the privileged rollouts of a cliff as soon as its student rollouts have all failed, while "
        "other prompts are still sampled. false, or a deterministic engine: after the last student "
        "rollout.",
    )
    refill_rounds: int = Field(
        0,
        ge=0,
        description="Dynamic sampling (DAPO): groups without signal for the objective are dropped, and further "
        "problems are sampled in their place, at most this many rounds per step; 0 keeps all groups.",
    )
    stop_at_reward: float | None = Field(
        None,
        description="Stop sampling a prompt at its first rollout with at least this reward, for objectives that only "
        "look for cliffs. The surrogate then sees short responses more often than long ones. SGLang only.",
    )
    ahead: int = Field(
        0,
        ge=0,
        description="Steps whose rollouts are sampled while earlier steps train: no token comes from weights that are "
        "older by more steps than this; importance weights correct for the age (objective.surrogate.importance_cap). "
        "More than 1 pays with swap=mid_generation only. SGLang only.",
    )
    swap: Literal["after_batch", "mid_generation"] = Field(
        "after_batch",
        description="With rollouts sampled ahead, when the weights are updated and the next step begins. after_batch: "
        "when the step that is being sampled is complete; mid_generation: at once, amid samples, and as soon as the "
        "servers have free slots.",
    )
    routing_replay: bool = Field(
        False,
        description="Route a rollout's tokens to the experts that the engine chose (R3); for models with experts. "
        "SGLang 0.5.23 returns them; given servers need --enable-return-routed-experts.",
    )
    save: bool = Field(
        True,
        description="Write every step's rollouts to rollouts/step_<n>.rank_<r>.jsonl.gz in the run folder, where each "
        "rank that samples writes its own.",
    )
    save_keep: int | None = Field(
        None, ge=1, description="Steps whose rollouts stay in the run folder, older ones are removed; null: all."
    )
    replay: Path | None = Field(
        None, description="Read the rollouts from this folder of saved ones in place of an engine."
    )

    @property
    def engine_dtype(self) -> str:
        """Return the precision in which the engine computes."""
        return self.embedded.dtype if self.engine == "embedded" else self.sglang.servers.dtype

    @property
    def takes_turns(self) -> bool:
        """Return whether trainer and servers have the same GPUs in turns, and servers lose their weights meanwhile."""
        sglang = self.sglang
        return self.engine == "sglang" and (sglang.servers.memory_saver or sglang.trainer_memory != "keep")

    @property
    def filtered(self) -> bool:
        """Return whether tokens are sampled from a truncated distribution."""
        return self.top_p < 1.0 or self.top_k is not None

    def sampling(self, n: int, stop_token_ids: tuple[int, ...], top_logprobs: int = 0) -> SamplingParams:
        """Return the sampling parameters of `n` training rollouts of one prompt."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            n=n,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            top_logprobs=top_logprobs,
            stop_token_ids=stop_token_ids,
            routed_experts=self.routing_replay,
        )
