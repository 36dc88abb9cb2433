"""Cases that every rank of a layout runs in the tests of the policy, in one process group; results by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tiny_policy import (
    ALL_IN_ONE,
    MODELS,
    ONE_PER_MICRO_BATCH,
    OPTIMIZER,
    SEVERAL,
    SPEC,
    build_policy,
    gradients_of,
    joined,
    make_examples,
    make_scorings,
    padding_gradient,
    weights_of,
)

from megatron_hdpo.model.policy import Policy
from megatron_hdpo.types.learning import Example

_WIDE = {"tensor": 2, "context": 2, "pipeline": 2, "virtual_stages": 2, "sequence": True}
# name: (world size, layout); replicas take what is left.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one_rank": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2_vp2": (2, {"pipeline": 2, "virtual_stages": 2}),
    "cp2": (2, {"context": 2}),
    "dp2": (2, {}),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp2_pp2_sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "tp2_dp2": (4, {"tensor": 2}),
    "pp2_dp2": (4, {"pipeline": 2}),
    "pp2_vp2_dp2": (4, {"pipeline": 2, "virtual_stages": 2}),
    "cp4": (4, {"context": 4}),
    "tp2_cp2_sp": (4, {"tensor": 2, "context": 2, "sequence": True}),
    "cp2_dp2": (4, {"context": 2}),
    "ep2": (2, {"expert": 2}),
    "ep2_pp2_vp2": (4, {"expert": 2, "pipeline": 2, "virtual_stages": 2}),
    "tp2_sp_ep2_etp2_dp2": (4, {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2}),
    "cp2_ep4_dp2": (4, {"context": 2, "expert": 4}),
    "tp2_cp2_pp2_vp2_sp": (8, _WIDE),
    "tp2_cp2_pp2_vp2_sp_ep2": (8, _WIDE | {"expert": 2}),
}

# Where the cases that are about the step, not about the split, are looked at.
EVERY_CASE = [
    "one_rank", "tp2_sp", "pp2", "pp2_vp2", "cp2", "dp2", "ep2", "tp2_pp2_sp", "pp2_dp2", "tp2_cp2_sp"
]  # fmt: skip


@dataclass
class Outcome:
    """Results of a case: metrics, gradients or weights by Hugging Face name, and values of this case only."""

    metrics: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


def run_layout(layout: str, paths: dict[str, Path]) -> dict[tuple[str, str, str], Outcome]:
    """Return (layout, model, case) -> Outcome on rank 0; other ranks return digests of their tensors only."""
    outcomes: dict[tuple[str, str, str], Outcome] = {}
    with joined(**LAYOUTS[layout][1]) as context:
        for model in models_of(layout):
            path = paths[model]
            for case, run in cases_of(layout, model).items():
                outcome = run(lambda path=path, **options: build_policy(path, context, **options))
                outcome.more["digest"] = digest(outcome.tensors)
                if context.rank:
                    outcome.tensors = {}
                outcomes[layout, model, case] = outcome
    return outcomes


def models_of(layout: str) -> list[str]:
    """Return all architectures on one and two ranks; on more ranks only those that can differ there.

    These are untied, tied with QK norms, and experts; only experts can be on expert-parallel ranks.
    """
    size, split = LAYOUTS[layout]
    if "expert" in split:
        return ["qwen3_moe"]
    experts = ["qwen3_moe"] if split.get("tensor", 1) == 1 or split.get("sequence") else []
    dense = [model for model in MODELS if model != "qwen3_moe"] if size < 4 else ["llama", "qwen3_tied"]
    return [*dense, *experts]


def first_model(layout: str) -> str:
    """Return the architecture that runs every case."""
    return "qwen3_moe" if "expert" in LAYOUTS[layout][1] else "llama"


def cases_of(layout: str, model: str) -> dict[str, Callable[[Build], Outcome]]:
    """Return the cases of a model: all of them for one model of the layouts in EVERY_CASE."""
    return CASES if layout in EVERY_CASE and model == first_model(layout) else CASES_OF_EVERY_MODEL


def digest(tensors: dict[str, np.ndarray]) -> str:
    """Equal if and only if every bit of every tensor is."""
    made = hashlib.sha256()
    for name in sorted(tensors):
        made.update(name.encode() + tensors[name].tobytes())
    return made.hexdigest()


def share(policy: Policy, examples: Sequence[Example]) -> list[Example]:
    """This replica's examples."""
    return list(examples)[policy.context.dp_rank :: policy.context.dp_size]


def _accumulate(policy: Policy, examples: Sequence[Example], spec: Any = SPEC) -> Outcome:
    metrics = policy.accumulate_gradients(examples, spec)
    outcome = Outcome(metrics, more={"padding": padding_gradient(policy)})
    outcome.tensors = gradients_of(policy)
    return outcome


Build = Callable[..., Policy]


def _gradients(build: Build, **options: Any) -> Outcome:
    policy = build(**options)
    return _accumulate(policy, share(policy, make_examples()))


def _gradients_twice(build: Build) -> Outcome:
    """The buffers hold the first step's gradients when the second one begins."""
    policy = build()
    _accumulate(policy, share(policy, make_examples(seed=5)))
    return _accumulate(policy, share(policy, make_examples()))


def _one_replica_has_all(build: Build) -> Outcome:
    """Other replicas hold nothing, not even a count."""
    policy = build()
    return _accumulate(policy, make_examples() if policy.context.dp_rank == 0 else [])


def _one_replica_is_inert(build: Build) -> Outcome:
    """The last replica's examples have no gradient, but their tokens count."""
    policy = build()
    inert = [_without_gradient(example) for example in make_examples()]
    if policy.context.dp_size == 1:
        return _accumulate(policy, [*make_examples(), *inert])
    return _accumulate(policy, make_examples() if policy.context.dp_rank == 0 else inert)


def _without_gradient(example: Example) -> Example:
    zeros = np.zeros_like(example.advantages_T)
    return replace(example, advantages_T=zeros, distill_weights_T=None if example.target is None else zeros)


def no_targets() -> list[Example]:
    return [replace(e, target=None, distill_weights_T=None, distill_count=0.0) for e in make_examples()]


def _no_distillation_token(build: Build) -> Outcome:
    policy = build()
    return _accumulate(policy, share(policy, no_targets()))


def _everything_inert(build: Build) -> Outcome:
    policy = build()
    return _accumulate(policy, share(policy, [_without_gradient(e) for e in make_examples()]))


def _nothing_at_all(build: Build) -> Outcome:
    return _accumulate(build(), [])


def overflowing() -> tuple[list[Example], list[Example]]:
    """Examples in which a ratio and an importance weight overflow float32 where the weight is zero; and the same with
    harmless numbers there."""
    examples = make_examples()
    for index in (0, 1):
        weights = examples[index].surrogate_weights_T.copy()
        weights[2:4] = 0.0
        examples[index] = replace(examples[index], surrogate_weights_T=weights)
    wild = list(examples)
    old, rollout = examples[0].old_logprobs_T.copy(), examples[0].rollout_logprobs_T.copy()
    old[2], rollout[3] = -300.0, -300.0
    wild[0] = replace(examples[0], old_logprobs_T=old, rollout_logprobs_T=rollout)
    old = examples[1].old_logprobs_T.copy()
    old[2:4] = -300.0
    wild[1] = replace(examples[1], old_logprobs_T=old)
    return wild, examples


# Without a dual clip nothing bounds the loss of a negative advantage but its weight.
UNBOUNDED = replace(SPEC, surrogate=SPEC.surrogate.model_copy(update={"dual_clip": None}))


def _overflow_at_zero_weight(build: Build) -> Outcome:
    policy = build()
    return _accumulate(policy, share(policy, overflowing()[0]), UNBOUNDED)


def _update(build: Build) -> Outcome:
    policy = build(optimizer=OPTIMIZER)
    metrics = policy.update(share(policy, make_examples()), SPEC)
    return Outcome(metrics, weights_of(policy))


def _update_after_a_bad_gradient(build: Build) -> Outcome:
    """One replica meets an advantage that is not a number; the next step is as if that had never been."""
    policy = build(optimizer=OPTIMIZER)
    before = digest(weights_of(policy))
    examples = make_examples()
    bad = replace(examples[0], advantages_T=examples[0].advantages_T * np.nan)
    first = policy.update(share(policy, [bad, *examples[1:]]), SPEC)
    unchanged = digest(weights_of(policy)) == before
    metrics = policy.update(share(policy, examples), SPEC)
    return Outcome(metrics, weights_of(policy), {"bad": first, "unchanged": unchanged})


def _score(build: Build) -> Outcome:
    policy = build(head_chunk=5)  # shorter than some responses
    mine = make_scorings()[policy.context.dp_rank :: policy.context.dp_size]
    seen: list[int] = []
    scores = policy.score(mine, on_progress=seen.append)
    return Outcome(more={"scores": scores, "last": policy.context.is_last_stage, "rows": sum(seen)})


CASES_OF_EVERY_MODEL: dict[str, Callable[[Build], Outcome]] = {
    "gradients": lambda build: _gradients(build, budget=SEVERAL),
    "update": _update,
    "score": _score,
}
CASES: dict[str, Callable[[Build], Outcome]] = CASES_OF_EVERY_MODEL | {
    "one_per_micro_batch": lambda build: _gradients(build, budget=ONE_PER_MICRO_BATCH),
    "all_in_one": lambda build: _gradients(build, budget=ALL_IN_ONE),
    "head_in_chunks": lambda build: _gradients(build, budget=ALL_IN_ONE, head_chunk=5),
    "recompute": lambda build: _gradients(build, recompute=True),
    "gradients_twice": _gradients_twice,
    "one_replica_has_all": _one_replica_has_all,
    "one_replica_is_inert": _one_replica_is_inert,
    "no_distillation_token": _no_distillation_token,
    "everything_inert": _everything_inert,
    "nothing_at_all": _nothing_at_all,
    "overflow_at_zero_weight": _overflow_at_zero_weight,
    "update_after_a_bad_gradient": _update_after_a_bad_gradient,
}
