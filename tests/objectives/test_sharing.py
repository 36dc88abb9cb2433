"""How a step's groups are shared between data-parallel replicas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_groups import group, sample

from megatron_hdpo.costs.flops import forward_flops
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig
from megatron_hdpo.sampling.step_rollouts import on_every_rank
from megatron_hdpo.tracking.console import Console
from megatron_hdpo.training.learner import Learner
from megatron_hdpo.types.rollouts import Group

# Sizes of a model of 1.5 billion parameters.
QWEN = Architecture("qwen2", 28, 1536, 8960, 12, 2, 128, 151936, 131072, 1e-6, 1e6, None, True, False, True)


def shares(groups: list[Group], replicas: int) -> list[list[Group]]:
    """Each replica's groups; all see the same list."""

    def of(rank: int) -> list[Group]:
        def gather(own: Any) -> list[Any]:
            """All groups are on every rank: to what can change the policy, the others have nothing to add."""
            return [(replica, True) for replica in range(replicas)] if isinstance(own, tuple) else [own]

        context = SimpleNamespace(
            rank=rank,
            dp_size=replicas,
            dp_rank=rank,
            is_last_stage=True,
            gather_objects=lambda own: (
                [(replica, True) for replica in range(replicas)] if type(own) is tuple else [own]
            ),
        )
        policy = SimpleNamespace(architecture=QWEN, context=context)
        learner = Learner(policy, GRPO(GRPOConfig(), ObjectiveDeps(1.0)), None, Console(enabled=False))  # type: ignore[arg-type]
        return learner._share(on_every_rank(groups))

    return [of(rank) for rank in range(replicas)]


def of_lengths(lengths: list[int], mixed: bool = True) -> Group:
    return group([sample(float(mixed and i == 0), length) for i, length in enumerate(lengths)])


def training_flops(groups: list[Group]) -> float:
    return forward_flops(QWEN, [(len(g.prompt_ids) + s.length, s.length) for g in groups for s in g.samples])


groups_of = st.lists(st.lists(st.integers(1, 300), min_size=2, max_size=4), max_size=12)


@settings(deadline=None, max_examples=50)
@given(groups_of, st.integers(1, 4))
def test_every_group_has_one_replica_and_loads_differ_by_one_group_at_most(
    lengths: list[list[int]], replicas: int
) -> None:
    groups = [of_lengths(of_group) for of_group in lengths]
    shared = shares(groups, replicas)
    assert sorted(id(g) for share in shared for g in share) == sorted(map(id, groups))
    loads = [training_flops(share) for share in shared]
    dearest = max((training_flops([g]) for g in groups), default=0.0)
    assert max(loads) - min(loads) <= dearest * (1 + 1e-9)


def test_one_long_response_weighs_more_than_its_tokens() -> None:
    """Sharing by tokens would give the replica of the two long responses a third group as well."""
    length = 60_000
    long, short = of_lengths([length, length]), [of_lengths([4000, 4000]) for _ in range(16)]
    tokens = [2 * length, *[8000] * 16]
    assert sum(tokens[1:]) > tokens[0]
    first, second = shares([long, *short], 2)
    assert len(first) == 1 and first[0] is long and len(second) == 16


@pytest.mark.parametrize("replicas", [2, 3])
def test_groups_that_teach_nothing_are_spread_and_do_not_displace_those_that_do(replicas: int) -> None:
    solved = [of_lengths([50, 50], mixed=False) for _ in range(3 * replicas)]
    mixed = [of_lengths([50, 50]) for _ in range(replicas)]
    for share in shares([*solved, *mixed], replicas):
        assert sum(any(g is other for other in mixed) for g in share) == 1 and len(share) == 4
