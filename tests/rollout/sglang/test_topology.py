"""Which rank owns which server, for every placement, on one node and on two."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from megatron_hdpo.parallel.location import RankLocation
from megatron_hdpo.rollout.sglang.config import SGLangConfig
from megatron_hdpo.rollout.sglang.servers.topology import TopologyError, given_urls, planned_servers

Owned = list[tuple[int, int, int]]


def locations(nodes: int, per_node: int, replica: int) -> list[RankLocation]:
    """Ranks node by node; every `replica`-th leads a data-parallel replica, as with TP innermost and no pipeline."""
    ranks = range(nodes * per_node)
    return [RankLocation(rank, rank % per_node, leads=rank % replica == 0) for rank in ranks]


def config(placement: str, tensor_parallel: int = 1, **settings: Any) -> SGLangConfig:
    return SGLangConfig.model_validate(
        {"placement": placement, "servers": {"tensor_parallel": tensor_parallel}} | settings
    )


def owned(settings: SGLangConfig, where: list[RankLocation], device: str = "cuda") -> Owned:
    """(owner, number on its node, first GPU)."""
    return [(s.owner, s.index, s.first_gpu) for s in planned_servers(settings, where, device)]


COLOCATED: list[tuple[int, int, int, int | None, Owned]] = [
    (1, 1, 1, None, [(0, 0, 0)]),
    (1, 4, 1, None, [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3)]),
    (1, 4, 2, None, [(0, 0, 0), (2, 1, 2)]),
    (1, 5, 2, None, [(0, 0, 0), (2, 1, 2)]),
    (1, 4, 2, 1, [(0, 0, 0)]),
    (2, 2, 1, None, [(0, 0, 0), (1, 1, 1), (2, 0, 0), (3, 1, 1)]),
    (2, 2, 2, None, [(0, 0, 0), (2, 0, 0)]),
    (2, 4, 2, 1, [(0, 0, 0), (4, 0, 0)]),
]


@pytest.mark.parametrize(("nodes", "per_node", "size", "replicas", "wanted"), COLOCATED)
def test_colocated_servers_stand_on_the_gpus_of_their_ranks(
    nodes: int, per_node: int, size: int, replicas: int | None, wanted: Owned
) -> None:
    for replica in (1, 2, per_node):
        where = locations(nodes, per_node, replica)
        assert owned(config("colocated", size, replicas=replicas), where) == wanted


def test_separate_servers_belong_to_leaders_of_their_node() -> None:
    one = config("separate", 1, gpus=[6, 4, 5, 7])
    assert owned(one, locations(1, 4, 2)) == [(0, 0, 4), (2, 1, 5), (0, 2, 6), (2, 3, 7)]
    assert owned(config("separate", 2, gpus=[4, 5, 6, 7]), locations(1, 4, 4)) == [(0, 0, 4), (0, 1, 6)]
    assert owned(config("separate", 2, gpus=[4, 5, 6, 7], replicas=1), locations(1, 4, 4)) == [(0, 0, 4)]
    assert owned(config("separate", 1, gpus=[2]), locations(2, 2, 2)) == [(0, 0, 2), (2, 0, 2)]


def test_a_node_without_a_leader_gives_its_servers_to_its_first_rank() -> None:
    where = locations(2, 2, 4)
    assert owned(config("separate", 1, gpus=[2]), where) == [(0, 0, 2), (2, 0, 2)]
    assert owned(config("colocated"), where, "cpu") == [(0, 0, 0), (2, 0, 0)]


def test_on_a_cpu_one_server_per_node_or_as_many_as_are_asked_for() -> None:
    assert owned(config("colocated", 2), locations(1, 4, 1), "cpu") == [(0, 0, 0)]
    assert owned(config("colocated", replicas=3), locations(1, 4, 2), "cpu") == [(0, 0, 0), (2, 1, 0), (0, 2, 0)]
    assert owned(config("separate", gpus=[0]), locations(2, 2, 1), "cpu") == [(0, 0, 0), (2, 0, 0)]


@pytest.mark.parametrize(
    ("settings", "per_node", "words"),
    [
        (config("colocated", 2), 1, "tensor_parallel 2 need more than the 1 ranks of a node"),
        (config("colocated", 1, replicas=3), 2, "3 servers of tensor_parallel 1 need more than the 2 ranks"),
        (config("colocated", 2, replicas=2), 3, "2 servers of tensor_parallel 2 need more than the 3 ranks"),
        (config("separate", 2, gpus=[1]), 1, "more than the 1 GPUs"),
        (config("separate", 1, gpus=[1, 2], replicas=3), 1, "more than the 2 GPUs"),
        (config("separate", 1, gpus=[1, 3]), 1, r"rollout\.sglang\.gpus: \[1, 3\] are not consecutive"),
    ],
)
def test_too_few_gpus_are_said(settings: SGLangConfig, per_node: int, words: str) -> None:
    with pytest.raises(TopologyError, match=words):
        planned_servers(settings, locations(1, per_node, 1), "cuda")


ALL = itertools.product(("colocated", "separate"), (1, 2), (2, 4), (1, 2, 4), (1, 2), ("cuda", "cpu"))


@pytest.mark.parametrize(("placement", "nodes", "per_node", "replica", "size", "device"), list(ALL))
def test_every_server_has_one_owner_on_its_own_node(
    placement: str, nodes: int, per_node: int, replica: int, size: int, device: str
) -> None:
    gpus = {"gpus": [per_node + i for i in range(4)]} if placement == "separate" else {}
    where = locations(nodes, per_node, replica)
    plan = planned_servers(config(placement, size, **gpus), where, device)
    by_node: dict[int, list[Any]] = {}
    for server in plan:
        by_node.setdefault(where[server.owner].node, []).append(server)
    assert len(by_node) == nodes, "servers on every node"
    for servers in by_node.values():
        assert [server.index for server in servers] == list(range(len(servers))), "log files of their own"
        if device == "cuda":
            used = [gpu for server in servers for gpu in range(server.first_gpu, server.first_gpu + size)]
            assert len(set(used)) == len(used), "no GPU has two servers"
            last = per_node if placement == "colocated" else per_node + 4
            assert max(used) < last
        if placement == "colocated" and device == "cuda":
            assert all(where[server.owner].local_rank == server.first_gpu for server in servers)


def test_given_servers_are_shared_among_leaders() -> None:
    urls = [f"http://h{i}:1" for i in range(3)]
    settings = config("given", urls=urls)
    for device in ("cpu", "cuda"):
        assert planned_servers(settings, locations(2, 2, 2), device) == []
    assert given_urls(settings, locations(1, 4, 4)) == {0: urls}
    assert given_urls(settings, locations(2, 2, 2)) == {0: [urls[0], urls[2]], 2: [urls[1]]}
    assert given_urls(settings, locations(1, 4, 1)) == {0: [urls[0]], 1: [urls[1]], 2: [urls[2]]}
    assert given_urls(config("colocated"), locations(1, 2, 1)) == {}
