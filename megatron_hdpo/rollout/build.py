"""Builds the engine of a recipe, its weight sync, and the list of the ranks that sample."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.trainer_memory import TrainerMemory
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.parallel.location import locate_rank
from megatron_hdpo.rollout.config import RolloutConfig
from megatron_hdpo.rollout.embedded import EmbeddedEngine
from megatron_hdpo.rollout.engine import Engine
from megatron_hdpo.rollout.sglang.answers import ExpertChoice
from megatron_hdpo.rollout.sglang.api import ApiError
from megatron_hdpo.rollout.sglang.config import SGLangConfig
from megatron_hdpo.rollout.sglang.engine import SGLangEngine
from megatron_hdpo.rollout.sglang.servers.command import ServerLaunch
from megatron_hdpo.rollout.sglang.servers.fleet import Report, ServerFleet, no_report
from megatron_hdpo.rollout.sglang.servers.server import ServerError
from megatron_hdpo.rollout.sglang.servers.topology import PlannedServer, given_urls, planned_servers
from megatron_hdpo.rollout.sglang.shared_gpu import CudaMemory, HostMemory, SharedGpu
from megatron_hdpo.rollout.sglang.stamps import RunStamp
from megatron_hdpo.rollout.sglang.weights.gate import Gate
from megatron_hdpo.rollout.sglang.weights.push import Transport, WeightPush
from megatron_hdpo.rollout.sglang.weights.same_model import check_served_models
from megatron_hdpo.rollout.sglang.weights.transports import BroadcastTransport, DiskTransport, Gather, TensorTransport
from megatron_hdpo.rollout.weight_sync import EmbeddedSync, ServerSync, WeightSync
from megatron_hdpo.types.errors import UserError
from megatron_hdpo.weights.stream import Receivers

T = TypeVar("T")
SHARE_OF_COLLECTIVE = 0.3
"""Longest wait for a server to take one bucket, in deadlines of a collective: the other ranks of the replica wait for
this one in the collective that gathers the next bucket, and it may wait for an answer, a broadcast, and its end."""


class EngineError(UserError, RuntimeError):
    """The engine cannot be started; the message says why and on which server."""


@dataclass(frozen=True)
class BuiltEngine:
    """An engine, its weight sync, and the ranks whose engine takes requests."""

    engine: Engine
    sync: WeightSync
    sampling_ranks: list[int]


def build_engine(
    config: RolloutConfig,
    model_path: Path,
    architecture: Architecture,
    context: ParallelContext,
    output: Path,
    report: Report = no_report,
    trainer: TrainerMemory | None = None,
    lengths: Mapping[str, int] | None = None,
) -> BuiltEngine:
    """Build the engine of the recipe on every rank. Collective.

    model_path: Hugging Face folder. output: the run's folder, for logs. report: gets the state of this rank's servers
    while they start. trainer: moves this rank's training state away while servers on its GPU sample; until the engine's
    next `make_room` it is away. lengths: tokens of the longest sequences that will be requested, each by the words for
    its settings; servers must have room for them. Raises EngineError, on every rank, when a server does not start or
    cannot be used.
    """
    if config.engine == "embedded" or config.replay is not None:
        embedded = config.embedded.model_copy(update={"vocab_size": architecture.vocab_size})
        engine = EmbeddedEngine(model_path, embedded, context.device)
        return BuiltEngine(engine, EmbeddedSync(engine), list(range(context.world_size)))
    return _on_servers(config, model_path, architecture, context, output, report, trainer, lengths)


def _on_servers(
    rollout: RolloutConfig,
    model_path: Path,
    architecture: Architecture,
    context: ParallelContext,
    output: Path,
    report: Report,
    trainer: TrainerMemory | None,
    lengths: Mapping[str, int] | None,
) -> BuiltEngine:
    """Build the engine on SGLang servers: start, connect, check, and choose the transport of weights."""
    config, device = rollout.sglang, context.device.type
    locations = context.gather_objects(locate_rank(context.rank, context.is_replica_leader))
    plan = together(context, lambda: planned_servers(config, locations, device))
    mine = [server for server in plan if server.owner == context.rank]
    shared_gpu = _shared_gpu(config, plan, context, trainer)
    if shared_gpu is not None:
        shared_gpu.give_back(asleep=False, weights=True)
    servers = together(context, lambda: _started(rollout, mine, model_path, context, output, report))
    stamp = RunStamp(context.broadcast_object(RunStamp().run))
    urls = servers.urls if servers else given_urls(config, locations).get(context.rank, [])
    engine = together(
        context,
        lambda: SGLangEngine(
            config=config,
            urls=urls,
            vocab_size=architecture.vocab_size,
            context_length=architecture.max_positions,
            servers=servers,
            experts=_experts(architecture),
            shared_gpu=shared_gpu,
            stamp=stamp,
            lengths=lengths,
        ),
        close=servers.close if servers else None,
    )
    together(context, lambda: check_served_models(engine, architecture), close=engine.close)
    if rollout.routing_replay:
        together(context, lambda: check_returns_experts(engine), close=engine.close)
    owners = sorted({server.owner for server in plan} | set(given_urls(config, locations)))
    receivers: Receivers = "leader" if all(locations[owner].leads for owner in owners) else "all"
    gate = None
    if config.sync.verify:
        gate = Gate(
            kv_heads=architecture.num_kv_heads,
            vocab_size=architecture.vocab_size,
            device=device,
            timeout_s=config.sync.timeout_s,
            min_peak=config.sync.min_peak,
            num_experts=architecture.num_experts,
        )
    transport = _transport(rollout, plan, model_path, context, output)
    return BuiltEngine(
        engine, ServerSync(WeightPush(engine, transport, gate, context.barrier), receivers, context), owners
    )


def _experts(architecture: Architecture) -> ExpertChoice | None:
    if not architecture.num_experts:
        return None
    return ExpertChoice(architecture.num_layers, architecture.num_experts, architecture.experts_per_token)


def check_returns_experts(engine: SGLangEngine) -> None:
    """Raise ValueError, naming the servers, when any was started without the flag that returns experts."""
    if silent := [replica.url for replica in engine.replicas if not replica.info.routed_experts]:
        raise ValueError(
            f"{', '.join(silent)} cannot return the experts of a token, which rollout.routing_replay needs: start them "
            "with --enable-return-routed-experts"
        )


def _shared_gpu(
    config: SGLangConfig, plan: Sequence[PlannedServer], context: ParallelContext, trainer: TrainerMemory | None
) -> SharedGpu | None:
    """Return the turns on this rank's GPU; None where no rank shares its GPU with a server.

    On a CPU there is no memory to hand over, but a trainer that is to move its state moves it.
    """
    if config.placement != "colocated" or (context.device.type != "cuda" and trainer is None):
        return None
    size = config.servers.tensor_parallel
    owners = {rank: server.owner for server in plan for rank in range(server.owner, server.owner + size)}
    memory = CudaMemory(context.device) if context.device.type == "cuda" else HostMemory()

    def gather(value: Any) -> list[Any]:
        context.barrier("memory released by servers")
        return context.gather_objects(value)

    return SharedGpu(memory, owners.get(context.rank), gather, trainer)


def _started(
    rollout: RolloutConfig,
    mine: Sequence[PlannedServer],
    model_path: Path,
    context: ParallelContext,
    output: Path,
    report: Report,
) -> ServerFleet | None:
    """Start the servers that this rank owns and return them once they answer; None where it owns none."""
    if not mine:
        return None
    config, device = rollout.sglang.servers, context.device.type
    shares = device == "cuda" and rollout.sglang.placement == "colocated"
    config.check(device)
    config.check_interpreter(device)
    node = os.environ.get("GROUP_RANK", "0")
    launches = [
        ServerLaunch(
            model=model_path,
            device=device,
            index=server.index,
            first_gpu=server.first_gpu,
            routed_experts=rollout.routing_replay,
            free_share=CudaMemory(context.device).free_share if shares else None,
        )
        for server in mine
    ]
    servers = ServerFleet(config, launches, output / "logs" / f"node{node}")
    servers.start(report)
    return servers


def _transport(
    rollout: RolloutConfig,
    plan: Sequence[PlannedServer],
    model_path: Path,
    context: ParallelContext,
    output: Path,
) -> Transport:
    config, device = rollout.sglang, context.device
    timeout = config.sync.timeout_s
    if context.layout.least_ranks > 1:
        timeout = min(timeout, SHARE_OF_COLLECTIVE * 60 * context.layout.timeout_minutes)
    path = config.sync.path
    shares_memory = device.type == "cpu" or config.placement == "colocated"
    if path == "auto":
        path = "tensor" if shares_memory else "distributed"
    if path == "disk":
        return DiskTransport(
            config.sync.timeout_s, (config.sync.folder or output / "sync") / f"rank{context.rank}", model_path
        )
    if path == "distributed":
        return BroadcastTransport(timeout, device)
    gather = _gather_on_server(plan, config.servers.tensor_parallel, context) if device.type == "cuda" else None
    return TensorTransport(timeout, gather)


def _gather_on_server(plan: Sequence[PlannedServer], size: int, context: ParallelContext) -> Gather | None:
    """Return a function that gathers a value from the ranks on whose GPUs this rank's server runs.

    Every rank creates every group, in the same order; None on a rank outside all of them.
    """
    mine = None
    for server in plan:
        ranks = list(range(server.owner, server.owner + size))
        group = dist.new_group(ranks, backend="gloo")
        mine = group if context.rank in ranks else mine
    if mine is None:
        return None
    group = mine
    return lambda value: context.gather_objects(value, group)


def together(context: ParallelContext, work: Callable[[], T], close: Callable[[], None] | None = None) -> T:
    """Run `work()` on every rank; raise an error of any rank on all of them, as EngineError. Collective.

    close: releases what this rank already holds when another rank fails; by default its result's own `close`.
    """
    result, failure = None, ""
    try:
        result = work()
    except (ApiError, ServerError, ValueError, OSError) as error:
        failure = str(error)
    context.barrier("start of the rollout engine")
    failures = [text for text in context.gather_objects(failure) if text]
    if failures:
        ended = close or getattr(result, "close", None)
        if ended is not None:
            ended()
        raise EngineError("rollout.engine: " + "; ".join(dict.fromkeys(failures)))
    return result  # type: ignore[return-value]
