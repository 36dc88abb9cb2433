"""Privileged rollouts that become distillation data: right, distinct, honest ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.data.leakage import LeakageConfig, find_leak
from megatron_hdpo.types.rollouts import Group, Sample

RIGHT_BUT_DROPPED = ("leaked", "duplicate", "over_cap")


class PrivilegedRolloutConfig(BaseModel):
    """Rollouts after the prompt that shows the answer, and which of them become distillation data."""

    model_config = ConfigDict(extra="forbid")

    rollouts: int = Field(8, ge=1, description="Privileged rollouts per prompt that gets any.")
    success_threshold: float = Field(1.0, description="Reward from which a rollout counts as right.")
    max_kept_per_prompt: int | None = Field(None, ge=1, description="Right rollouts kept per prompt, at most.")
    drop_duplicates: bool = Field(True, description="Keep one of several equal rollouts of a prompt.")


@dataclass(frozen=True)
class PrivilegedFilter:
    """Which privileged rollouts are kept. markers: strings of their prompt that no honest response contains."""

    config: PrivilegedRolloutConfig
    leakage: LeakageConfig
    markers: tuple[str, ...] = ()

    def keep(self, group: Group) -> Group:
        """The group with its right, distinct, honest privileged rollouts, first come first kept; others counted."""
        kept: list[Sample] = []
        seen: set[bytes] = set()
        for sample in group.privileged:
            reason = self._why_drop(sample, seen, len(kept))
            if reason is None:
                seen.add(sample.completion.token_ids.tobytes())
                kept.append(sample)
            else:
                group.dropped[reason] = group.dropped.get(reason, 0) + 1
        group.privileged = kept
        return group

    def is_right(self, sample: Sample) -> bool:
        """Whether a rollout counts as right."""
        return sample.reward >= self.config.success_threshold

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


def privileged_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Privileged rollouts that were judged, how many were right, and why right ones were dropped."""
    kept = sum(len(group.privileged) for group in groups)
    dropped = {r: sum(g.dropped.get(r, 0) for g in groups) for r in ("wrong", *RIGHT_BUT_DROPPED)}
    right = kept + sum(dropped[reason] for reason in RIGHT_BUT_DROPPED)
    judged = right + dropped["wrong"]
    metrics = {"privileged/rollouts": float(judged), "privileged/kept": float(kept)}
    metrics |= {f"privileged/{reason}": float(dropped[reason]) for reason in RIGHT_BUT_DROPPED}
    return metrics | ({"privileged/success_rate": right / judged} if judged else {})
