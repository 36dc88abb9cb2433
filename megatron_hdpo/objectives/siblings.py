"""Hints from the other samples of a group: which of them can serve, which are drawn, and what is shown of them.

A sibling is any other student sample of the same group. Samples are compared by index, so an identical text still
counts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.data.prompts import Hint
from megatron_hdpo.rewards.extraction import extract_answer, visible_text
from megatron_hdpo.types.rollouts import Group, Sample


class SiblingConfig(BaseModel):
    """Rule for right siblings, and for the part of a sibling that is shown."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    success_threshold: float = Field(1.0, description="Reward from which a rollout counts as right.")
    remove_thinking: bool = Field(False, description="Show only the part of a sibling after its last </think>.")


class PairConfig(SiblingConfig):
    """Right and wrong siblings as hints, shown by the same template."""

    wrong_need_answer: bool = Field(
        True, description="Use only wrong siblings with an answer in a box; false for tasks without boxed answers."
    )


def others(group: Group, index: int) -> list[Sample]:
    """Return all student samples of the group except one."""
    return [sample for s, sample in enumerate(group.samples) if s != index]


def right_siblings(group: Group, index: int, config: SiblingConfig) -> list[Sample]:
    """Return the right siblings that have any text to show."""
    return [s for s in others(group, index) if s.correctness >= config.success_threshold and _shown(s, config)]


def wrong_siblings(group: Group, index: int, config: PairConfig) -> list[Sample]:
    """Return the wrong siblings that have any text to show, and an answer in a box if the config needs one."""
    wrong = [s for s in others(group, index) if s.correctness < config.success_threshold and _shown(s, config)]
    return [s for s in wrong if not config.wrong_need_answer or _boxed_answer(s.text)]


def has_pair(group: Group, index: int, config: PairConfig) -> bool:
    """Return whether the sample has a right and a wrong sibling.

    The only right sample of a group has no right sibling, the only wrong one no wrong sibling.
    """
    return bool(right_siblings(group, index, config) and wrong_siblings(group, index, config))


def sibling_hint(sample: Sample, config: SiblingConfig) -> Hint:
    """Return a sibling as a hint: its text, and the answer that it gives in a box, if any."""
    return Hint(_shown(sample, config), _boxed_answer(sample.text))


def draw(candidates: Sequence[Sample], count: int, target: Sample, *seed: object) -> list[Sample]:
    """Return `count` of the candidates as hints for `target`, or all if there are fewer.

    Over seeds every set is equally likely. A hash of the seed and of all tokens decides, so the order of the candidates
    does not matter.
    """
    salt = "/".join(map(str, seed)).encode() + _digest(target.completion.token_ids.tobytes())
    seen: Counter[bytes] = Counter()
    ranked: list[tuple[bytes, int, Sample]] = []
    for candidate in candidates:
        tokens = candidate.completion.token_ids.tobytes()
        ranked.append((_digest(salt, seen[tokens].to_bytes(4, "little"), tokens), len(ranked), candidate))
        seen[tokens] += 1
    return [candidate for *_, candidate in sorted(ranked, key=lambda entry: entry[:2])[:count]]


def pair_hints(group: Group, index: int, config: PairConfig, step: int, wrong: int = 1) -> list[Hint]:
    """Return the hints of one right sibling and of up to `wrong` wrong ones, in this order, drawn for a sample.

    The draw depends on the step, the problem and the tokens alone. Needs `has_pair`.
    """
    found = {"right": (right_siblings(group, index, config), 1), "wrong": (wrong_siblings(group, index, config), wrong)}
    target = group.samples[index]
    drawn = (draw(c, count, target, step, group.problem.id, name) for name, (c, count) in found.items())
    return [sibling_hint(sample, config) for samples in drawn for sample in samples]


def _shown(sample: Sample, config: SiblingConfig) -> str:
    return (visible_text(sample.text) if config.remove_thinking else sample.text).strip()


@lru_cache(maxsize=256)
def _boxed_answer(text: str) -> str:
    """Return the answer in the last box, or "". Cached, because every sibling asks for the same long texts."""
    answer = extract_answer(text)
    return answer.text if answer else ""


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()
