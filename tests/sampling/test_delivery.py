"""Delivery: each rank gets the groups that it learns from, as they were sampled, and nothing else crosses the wire."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from distributed_helper import run_ranks

from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.parallel.exchange import exchange
from megatron_hdpo.sampling import delivery
from megatron_hdpo.sampling.delivery import deliver_to_all, deliver_to_leader, deliver_to_replicas, from_bytes, to_bytes
from megatron_hdpo.sampling.step_rollouts import StepRollouts, gather_outlines, on_every_rank
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, Group, Sample, TopKArrays, outline_of

WORLD, GROUPS, TOP = 8, 12, 4
LAYOUTS: dict[str, dict[str, int]] = {
    "dp8": {},
    "tp2_pp2_dp2": {"tensor": 2, "pipeline": 2},
    "pp4_dp2": {"pipeline": 4},
    "cp2_tp2_dp2": {"context": 2, "tensor": 2},
    "tp2_pp2_cp2": {"tensor": 2, "pipeline": 2, "context": 2},
}
SAMPLING_RANKS = {"every rank": range(WORLD), "two ranks": (1, 6)}
PER_SAMPLE, PER_MESSAGE = 500, 1000
"""Bytes that may describe a sample's arrays, and a message."""


def completion(rng: np.random.Generator, length: int, top: bool) -> Completion:
    ids = rng.integers(0, 1000, length).astype(np.int32)
    tops = TopKArrays(rng.integers(0, 1000, (length, TOP), dtype=np.int32), rng.random((length, TOP), dtype=np.float32))
    return Completion(
        ids, -rng.random(length, dtype=np.float32), "stop", np.full(length, 3, np.int32), tops if top else None
    )


def group_of(index: int) -> Group:
    """A group of long responses, every third with privileged samples that have top log-probs."""
    rng = np.random.default_rng(index)

    def sample(top: bool) -> Sample:
        made = completion(rng, int(rng.integers(200, 900)), top)
        components = {"task": float(top), "judge": float(rng.random())} if index % 2 else {}
        feedback, decided_by = None if top else f"feedback {index}", "task" if components else ""
        return Sample(made, f"response {index} " * 50, float(rng.random()), feedback, components, decided_by)

    cliff = index % 3 == 0
    return Group(
        problem=Problem(f"task/{index}", "task", f"q{index}", "a"),
        prompt_ids=rng.integers(0, 1000, 30).astype(np.int32),
        samples=[sample(False) for _ in range(4)],
        privileged_prompt_ids=rng.integers(0, 1000, 50).astype(np.int32) if cliff else None,
        privileged_samples=[sample(True) for _ in range(2)] if cliff else [],
        dropped={"leaked": index},
    )


def all_samples(group: Group) -> list[Sample]:
    return [*group.samples, *group.privileged_samples]


def same(left: Any, right: Any) -> bool:
    """Whether two values made of dataclasses, lists and arrays are equal to the bit."""
    return bool(pickle.dumps(_plain(left)) == pickle.dumps(_plain(right)))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {name: _plain(item) for name, item in vars(value).items()} if hasattr(value, "__dict__") else repr(value)


def without_logprobs(group: Group) -> Group:
    def stripped(sample: Sample) -> Sample:
        bare = {"logprobs": np.zeros(0, np.float32), "weight_versions": np.zeros(0, np.int32), "top_logprobs": None}
        return replace(sample, completion=replace(sample.completion, **bare))

    return replace(
        group,
        samples=[stripped(sample) for sample in group.samples],
        privileged_samples=[stripped(sample) for sample in group.privileged_samples],
    )


@dataclass
class Seen:
    """What one rank saw of a delivery. received: bytes of its messages, in the order of the exchanges."""

    dp_rank: int
    is_last_stage: bool
    right: bool
    received: list[int] = field(default_factory=list)
    sent: int = 0
    expected: list[int] = field(default_factory=list)
    samples: int = 0


def bytes_of(group: Group) -> tuple[int, int]:
    """Bytes of tokens and texts, and of log-probs, versions and top log-probs."""
    prompts = len(group.prompt_ids) + (0 if group.privileged_prompt_ids is None else len(group.privileged_prompt_ids))
    tokens = 4 * prompts + sum(4 * s.length + len(s.text) + len(s.feedback or "") for s in all_samples(group))
    tops = sum(8 * TOP * s.length for s in group.privileged_samples)
    return tokens, 8 * sum(s.length for s in all_samples(group)) + tops


def dealt(context: ParallelContext, sampling_ranks: Any) -> StepRollouts:
    """Groups that ranks have sampled, as the coordinator deals their problems."""
    ranks = list(sampling_ranks)
    own = {i: group_of(i) for i in range(GROUPS) if ranks[i % len(ranks)] == context.rank}
    return gather_outlines(own, context, [group_of(i).problem for i in range(GROUPS)])


@dataclass
class Placed:
    """A rank of a layout, in Megatron's order, on a group of all ranks: a delivery needs none of the other groups."""

    host: dist.ProcessGroup
    tensor: int = 1
    context: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        self.rank, self.world_size = self.host.rank(), self.host.size()
        shared = self.tensor * self.context
        self.dp_size = self.world_size // (shared * self.pipeline)
        self.dp_rank = self.rank // shared % self.dp_size
        self.is_last_stage = self.rank >= self.world_size - self.world_size // self.pipeline

    def gather_objects(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self.host)
        return gathered


def joined(**layout: int) -> Any:
    """This rank in the world that torchrun's variables describe."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return Placed(dist.group.WORLD, **layout)


def deliver_on_layouts(layouts: dict[str, dict[str, int]]) -> dict[tuple[str, str], Seen]:
    return {
        (name, who): _deliver(joined(**split), ranks)
        for name, split in layouts.items()
        for who, ranks in SAMPLING_RANKS.items()
    }


def _deliver(context: ParallelContext, sampling_ranks: Any) -> Seen:
    rollouts = dealt(context, sampling_ranks)
    replica_of = [(i + 1) % context.dp_size for i in range(GROUPS)]
    parts = [[i for i in range(GROUPS) if replica_of[i] == replica] for replica in range(context.dp_size)]
    seen = Seen(context.dp_rank, context.is_last_stage, right=False)

    def counted(outgoing: Any, group: Any) -> Any:
        incoming = exchange(outgoing, group)
        seen.received.append(sum(map(len, incoming.values())))
        seen.sent += sum(map(len, outgoing.values()))
        return incoming

    delivery.exchange = counted  # type: ignore[assignment]
    try:
        groups = deliver_to_replicas(rollouts, parts, context)
    finally:
        delivery.exchange = exchange
    mine = parts[context.dp_rank]
    wanted = [
        group_of(i) if context.is_last_stage or i in rollouts.held else without_logprobs(group_of(i)) for i in mine
    ]
    seen.right = len(groups) == len(wanted) and all(map(same, groups, wanted))
    moved = [group_of(i) for i in mine if i not in rollouts.held]
    tokens, logprobs = (sum(column) for column in zip(*map(bytes_of, moved), strict=True)) if moved else (0, 0)
    seen.expected = [tokens, logprobs if context.is_last_stage else 0]
    seen.samples = sum(len(all_samples(group)) for group in moved)
    return seen


@pytest.fixture(scope="module")
def found() -> list[dict[tuple[str, str], Seen]]:
    return run_ranks(WORLD, deliver_on_layouts, LAYOUTS)


@pytest.mark.parametrize("who", SAMPLING_RANKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_receives_its_share_and_no_other_byte(
    found: list[dict[tuple[str, str], Seen]], layout: str, who: str
) -> None:
    """Not padded, not pickled, and log-probs only on the last stage: the bytes are those of the arrays and texts."""
    for rank, seen in enumerate(of_rank[layout, who] for of_rank in found):
        assert seen.right, f"rank {rank}: other groups, another order or other numbers"
        for received, expected in zip(seen.received, seen.expected, strict=True):
            described = PER_SAMPLE * seen.samples + PER_MESSAGE * WORLD if expected else 0
            assert expected <= received <= expected + described, rank
    of_layout = [of_rank[layout, who] for of_rank in found]
    assert sum(seen.sent for seen in of_layout) == sum(sum(seen.received) for seen in of_layout)


def test_a_rank_holds_a_fraction_of_the_step(found: list[dict[tuple[str, str], Seen]]) -> None:
    """What every rank used to receive was all of it, times the number of ranks over that of the sampling ranks."""
    whole = sum(sum(bytes_of(group_of(i))) for i in range(GROUPS))
    for of_rank in found:
        assert sum(of_rank["dp8", "two ranks"].received) < 0.3 * whole
        half = of_rank["tp2_pp2_dp2", "every rank"]
        assert sum(half.received) < (0.65 if half.is_last_stage else 0.35) * whole


def test_an_outline_is_small_and_does_not_grow_with_the_response() -> None:
    bare = replace(outline_of(group_of(0)), problem=None)  # type: ignore[arg-type]
    assert len(pickle.dumps(bare)) / 6 < 100


def to_all_and_to_leader() -> tuple[bool, list[int]]:
    context = joined(pipeline=2)
    rollouts = dealt(context, (1,))
    everywhere = deliver_to_all(rollouts, context)
    leader = deliver_to_leader(rollouts, context)
    right = all(same(group, group_of(i)) for part in (everywhere, leader) for i, group in enumerate(part))
    return right, [len(everywhere), len(leader)]


def test_a_handful_of_groups_can_go_to_every_rank_or_to_the_leader() -> None:
    assert run_ranks(2, to_all_and_to_leader) == [(True, [GROUPS, GROUPS]), (True, [GROUPS, 0])]


def test_groups_that_are_there_already_are_not_moved() -> None:
    """A world of one rank, and rollouts that every rank has read: no exchange, and the very same objects."""

    class Alone:
        rank, world_size, dp_rank, is_last_stage = 0, 1, 0, True

        def gather_objects(self, value: Any) -> Iterator[Any]:
            yield value

    groups = [group_of(i) for i in range(3)]
    delivered = deliver_to_replicas(on_every_rank(groups), [[2, 0]], Alone())  # type: ignore[arg-type]
    assert delivered[0] is groups[2] and delivered[1] is groups[0]


def test_arrays_are_restored_to_the_bit_and_can_be_written() -> None:
    nan = np.array([0x7FC00001], dtype=np.uint32).view(np.float32)
    value = {"a": [nan, np.zeros((0, 3), np.int32)], "b": np.arange(6, dtype=np.uint8).reshape(2, 3), "c": "text"}
    restored = from_bytes(to_bytes(value))
    assert restored["a"][0].tobytes() == nan.tobytes() and restored["a"][1].shape == (0, 3) and restored["c"] == "text"
    assert restored["b"].tolist() == [[0, 1, 2], [3, 4, 5]]
    restored["b"][0, 0] = 9
    assert all(array.flags.aligned for array in (*restored["a"], restored["b"]))


def exchanged() -> dict[int, list[int]]:
    context = joined()
    rank = context.rank
    to_others = [to for to in range(3) if to != rank]
    outgoing = {to: np.full(rank + 3 * to, 10 * rank + to, np.uint8) for to in to_others if rank + to}
    return {source: message.tolist() for source, message in exchange(outgoing, context.host).items()}


def test_messages_of_any_length_reach_the_rank_that_they_are_for() -> None:
    def message(source: int, to: int) -> list[int]:
        return [10 * source + to] * (source + 3 * to)

    received = run_ranks(3, exchanged)
    for to, messages in enumerate(received):
        assert messages == {source: message(source, to) for source in range(3) if source != to and message(source, to)}
