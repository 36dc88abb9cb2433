"""Which rank starts and uses which servers: pure functions of the configuration and the ranks' locations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hdpo.parallel.location import RankLocation
from megatron_hdpo.rollout.sglang.config import SGLangConfig


class TopologyError(ValueError):
    """The servers do not fit the ranks or the GPUs; the message says which key to change."""


@dataclass(frozen=True)
class PlannedServer:
    """A server of a node.

    owner: rank that starts and uses it. index: number among the node's servers. first_gpu: first of its devices, among
    those visible to the owner.
    """

    owner: int
    index: int
    first_gpu: int = 0


def planned_servers(config: SGLangConfig, locations: Sequence[RankLocation], device: str) -> list[PlannedServer]:
    """Return the servers that the run starts, over all nodes; none with placement=given.

    Raises TopologyError when they do not fit.
    """
    if config.placement == "given":
        return []
    nodes: dict[int, list[RankLocation]] = {}
    for location in locations:
        nodes.setdefault(location.node, []).append(location)
    return [server for node in nodes.values() for server in _of_node(config, node, device)]


def _of_node(config: SGLangConfig, locations: list[RankLocation], device: str) -> list[PlannedServer]:
    size = config.servers.tensor_parallel
    if config.placement == "colocated" and device == "cuda":
        count = _count(config, len(locations), "colocated servers share the ranks' GPUs", "ranks")
        return [PlannedServer(locations[s * size].rank, s, s * size) for s in range(count)]
    leaders = [location.rank for location in locations if location.leads] or [locations[0].rank]
    if config.placement == "separate" and device == "cuda":
        gpus = sorted(config.gpus)
        if gpus != list(range(gpus[0], gpus[0] + len(gpus))):
            raise TopologyError(f"rollout.sglang.gpus: {config.gpus} are not consecutive numbers")
        count = _count(config, len(gpus), "rollout.sglang.gpus are too few", "GPUs")
        return [PlannedServer(leaders[s % len(leaders)], s, gpus[0] + s * size) for s in range(count)]
    return [PlannedServer(leaders[s % len(leaders)], s) for s in range(config.replicas or 1)]


def _count(config: SGLangConfig, available: int, why: str, what: str) -> int:
    size = config.servers.tensor_parallel
    count = config.replicas or available // size
    if count < 1 or count * size > available:
        raise TopologyError(
            f"rollout.sglang: {config.replicas or 1} servers of tensor_parallel {size} need more than the {available} "
            f"{what} of a node ({why}): lower rollout.sglang.replicas or rollout.sglang.servers.tensor_parallel"
        )
    return count


def given_urls(config: SGLangConfig, locations: Sequence[RankLocation]) -> dict[int, list[str]]:
    """Return the given addresses by the rank that uses each one: the leaders of the replicas, in turn."""
    leaders = [location.rank for location in locations if location.leads]
    shared: dict[int, list[str]] = {}
    for i, url in enumerate(config.urls):
        shared.setdefault(leaders[i % len(leaders)], []).append(url)
    return shared
