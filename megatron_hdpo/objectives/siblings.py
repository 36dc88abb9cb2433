"""Hints from the other rollouts of a group: which of them may serve, which are drawn, and what is shown of them.

A sibling is another rollout of the group, told from the sample itself by its place: a copy that another draw gave is a
sibling.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.data.prompts import Hint
from megatron_hdpo.rewards.extraction import extract_answer, visible_text
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Group, Sample


class PrivilegedPrompts(Protocol):
    """What a method asks of the prompts: `PromptBuilder`, or a stand-in. Both give ids int32 [P]."""

    def privileged(self, problem: Problem) -> np.ndarray:
        """The prompt that shows the ground truth."""

    def hinted(self, problem: Problem, hint: Hint) -> np.ndarray:
        """The prompt that shows a hint."""


class SiblingConfig(BaseModel):
    """Which siblings are right, and what is shown of one."""

    model_config = ConfigDict(extra="forbid")

    success_threshold: float = Field(1.0, description="Reward from which a rollout counts as right.")
    remove_thinking: bool = Field(False, description="Show a sibling from its last </think> on.")


class PairConfig(SiblingConfig):
    """Right and wrong siblings as hints, shown by one template in the same words."""

    wrong_need_answer: bool = Field(
        True, description="Show no wrong sibling without an answer in a box; false for tasks that ask for none."
    )


def others(group: Group, index: int) -> list[Sample]:
    """All samples of the group but one."""
    return [sample for s, sample in enumerate(group.samples) if s != index]


def right_siblings(group: Group, index: int, config: SiblingConfig) -> list[Sample]:
    """The right ones among the others that show any text."""
    return [s for s in others(group, index) if s.reward >= config.success_threshold and _shown(s, config)]


def wrong_siblings(group: Group, index: int, config: PairConfig) -> list[Sample]:
    """The wrong ones among the others that show any text, and an answer where one is needed."""
    wrong = [s for s in others(group, index) if s.reward < config.success_threshold and _shown(s, config)]
    return [s for s in wrong if not config.wrong_need_answer or _boxed_answer(s.text)]


def has_pair(group: Group, index: int, config: PairConfig) -> bool:
    """Whether there is a right and a wrong sibling. A lone success has no right one, a lone failure no wrong one."""
    return bool(right_siblings(group, index, config) and wrong_siblings(group, index, config))


def sibling_hint(sample: Sample, config: SiblingConfig) -> Hint:
    """A sibling as a hint: its text, and the answer that it gives in a box, if any."""
    return Hint(_shown(sample, config), _boxed_answer(sample.text))


def draw(candidates: Sequence[Sample], count: int, target: Sample, *seed: object) -> list[Sample]:
    """`count` of the candidates as hints for `target`, each set of them equally likely over seeds; all where there are
    fewer. The order in which they come does not matter: what decides is a hash of the seed and everybody's tokens."""
    salt = "/".join(map(str, seed)).encode() + _digest(target.completion.token_ids.tobytes())
    seen: Counter[bytes] = Counter()
    ranked: list[tuple[bytes, int, Sample]] = []
    for candidate in candidates:
        tokens = candidate.completion.token_ids.tobytes()
        ranked.append((_digest(salt, seen[tokens].to_bytes(4, "little"), tokens), len(ranked), candidate))
        seen[tokens] += 1
    return [candidate for *_, candidate in sorted(ranked, key=lambda entry: entry[:2])[:count]]


def _shown(sample: Sample, config: SiblingConfig) -> str:
    return (visible_text(sample.text) if config.remove_thinking else sample.text).strip()


@lru_cache(maxsize=256)
def _boxed_answer(text: str) -> str:
    """The answer in the last box, "" without one. Every sibling of a group asks it of the same long texts."""
    answer = extract_answer(text)
    return answer.text if answer else ""


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()
