"""Filter of privileged samples: the right, distinct and honest ones become distillation data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.data.leakage import LeakageConfig, find_leak
from megatron_hdpo.types.rollouts import Group, JudgedGroup, JudgedSample, Sample

RIGHT_BUT_DROPPED = ("leaked", "duplicate", "over_cap")


class PrivilegedRolloutConfig(BaseModel):
    """Rollouts sampled with the prompt that shows the answer, and which of them become distillation data."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    rollouts: int = Field(8, ge=1, description="Privileged rollouts per prompt that has any.")
    success_threshold: float = Field(1.0, description="Reward from which a rollout counts as right.")
    max_kept_per_prompt: int | None = Field(None, ge=1, description="Right rollouts kept per prompt, at most.")
    drop_duplicates: bool = Field(True, description="Keep only the first of several equal rollouts of a prompt.")


@dataclass(frozen=True)
class PrivilegedFilter:
    """Choice of the privileged samples to keep. markers: strings of their prompt that no honest response contains."""

    config: PrivilegedRolloutConfig
    leakage: LeakageConfig
    markers: tuple[str, ...] = ()

    def keep(self, group: Group) -> Group:
        """Return the group with only its right, distinct, honest privileged samples, in order of arrival.

        The group is changed. Dropped samples are counted in `group.dropped` by reason.
        """
        kept: list[Sample] = []
        seen: set[bytes] = set()
        for sample in group.privileged_samples:
            reason = self._why_drop(sample, seen, len(kept))
            if reason is None:
                seen.add(sample.completion.token_ids.tobytes())
                kept.append(sample)
            else:
                group.dropped[reason] = group.dropped.get(reason, 0) + 1
        group.privileged_samples = kept
        return group

    def is_right(self, sample: JudgedSample) -> bool:
        """Return whether the correctness of a sample reaches the success threshold."""
        return sample.correctness >= self.config.success_threshold

    def _why_drop(self, sample: Sample, seen: set[bytes], kept: int) -> str | None:
        if not self.is_right(sample):
            return "wrong"
        if self.leakage.enabled and find_leak(sample.text, self.markers, self.leakage.phrases):
            return "leaked"
        if self.config.drop_duplicates and sample.completion.token_ids.tobytes() in seen:
            return "duplicate"
        if self.config.max_kept_per_prompt is not None and kept >= self.config.max_kept_per_prompt:
            return "over_cap"
        return None


def privileged_metrics(groups: Sequence[JudgedGroup]) -> dict[str, float]:
    """Return the number of judged privileged samples, the share of right ones, and why right ones were dropped."""
    kept = sum(len(group.privileged_samples) for group in groups)
    dropped = {r: sum(g.dropped.get(r, 0) for g in groups) for r in ("wrong", *RIGHT_BUT_DROPPED)}
    right = kept + sum(dropped[reason] for reason in RIGHT_BUT_DROPPED)
    judged = right + dropped["wrong"]
    metrics = {"privileged/rollouts": float(judged), "privileged/kept": float(kept)}
    metrics |= {f"privileged/{reason}": float(dropped[reason]) for reason in RIGHT_BUT_DROPPED}
    return metrics | ({"privileged/success_rate": right / judged} if judged else {})
