"""Plan of a step on one layout, and the search over layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from megatron_hdpo.costs.cluster import GIB, Cluster
from megatron_hdpo.costs.errors import PlanError
from megatron_hdpo.costs.layout import Layout, check
from megatron_hdpo.costs.memory import (
    PhaseMemory,
    by_phase,
    cache_bytes_per_token,
    cache_room,
    host_bytes,
    why_not,
)
from megatron_hdpo.costs.workload import RolloutSetup, Workload
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.planner.phase_time import PhaseTime
from megatron_hdpo.planner.sampling_time import Batch, sampling, sync
from megatron_hdpo.planner.time import scoring, training

_MOST_STAGES = 20  # of a search; deeper pipelines of 80 layers only add bubbles
_CONTEXT_TOKENS = 4096  # fewest tokens of the longest sequence per context-parallel rank of a search


@dataclass(frozen=True)
class Plan:
    """Plan of a step on one layout. refusals: why it does not fit; empty if it does."""

    architecture: Architecture
    cluster: Cluster
    layout: Layout
    workload: Workload
    rollouts: RolloutSetup
    memory: dict[str, PhaseMemory]
    host_bytes: float
    phases: tuple[PhaseTime, ...]
    refusals: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Return whether every phase fits in the GPU's memory."""
        return not self.refusals

    @property
    def gpus(self) -> int:
        """Return the number of GPUs of the trainer and of separate servers."""
        return self.layout.world + self.rollouts.gpus

    @property
    def step_s(self) -> float:
        """Return the seconds of a step; with rollouts ahead, the longer of sampling and the rest."""
        sampled = sum(p.time_s for p in self.phases if "sampling" in p.phase)
        rest = sum(p.time_s for p in self.phases) - sampled
        return max(sampled, rest) if self.rollouts.ahead else sampled + rest

    @property
    def tokens(self) -> float:
        """Return the prompt and response tokens of a step's student rollouts."""
        return self.workload.student_sequences * self.workload.sequence_tokens

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Return the tokens of a step's student rollouts per second and GPU."""
        return self.tokens / self.step_s / self.gpus

    @property
    def mfu(self) -> float:
        """Return useful arithmetic of all phases divided by the peak of all GPUs."""
        return sum(p.flops for p in self.phases) / (self.step_s * self.gpus * self.cluster.gpu.flops_s)


def plan(
    architecture: Architecture, cluster: Cluster, layout: Layout, workload: Workload, rollouts: RolloutSetup
) -> Plan:
    """Return the plan of a step.

    Raises PlanError if the trainer refuses the layout; missing memory is listed in the plan's `refusals`.
    """
    check(layout, architecture)
    if workload.teacher_model is not None:
        check(layout, workload.teacher_model)
    if layout.world + rollouts.gpus > cluster.gpus:
        raise PlanError(f"{layout} and {rollouts.gpus} rollout GPUs are more than the cluster's {cluster.gpus} GPUs")
    if architecture.num_heads % rollouts.tensor:
        raise PlanError(f"a server of {rollouts.tensor} GPUs does not divide {architecture.num_heads} attention heads")
    engines = _engines(layout, rollouts)
    batch, cache = student_batch(
        a=architecture, cluster=cluster, layout=layout, workload=workload, rollouts=rollouts, engines=engines
    )
    memory = by_phase(architecture, layout, workload, rollouts, cache)
    refusals = why_not(memory, cluster.gpu)
    if batch.at_once < 1:
        refusals.append("sampling: no room for the key-value cache of a single longest sequence beside the weights")
        batch = replace(batch, at_once=1.0)
    privileged = replace(
        batch,
        sequences=workload.privileged_sequences / engines,
        prompts=workload.privileged_prompts / engines,
        prompt_tokens=workload.privileged_prompt_tokens,
        at_once=max(1e-9, min(batch.at_once, workload.privileged_sequences / engines)),
    )
    others = [scoring(architecture, layout, workload, weights, cluster) for weights in ("policy", "reference")]
    sampled = partial(sampling, architecture, engines=engines, workload=workload, rollouts=rollouts, cluster=cluster)
    phases = (
        sampled(phase="sampling", batch=batch),
        sampled(phase="privileged sampling", batch=privileged),
        scoring(architecture, layout, workload, "teacher", cluster),
        *(found for found in others if found.time_s),
        training(architecture, layout, workload, cluster),
        sync(architecture, layout, rollouts, cluster),
    )
    host = host_bytes(architecture, layout, workload, rollouts)
    return Plan(
        architecture=architecture,
        cluster=cluster,
        layout=layout,
        workload=workload,
        rollouts=rollouts,
        memory=memory,
        host_bytes=host,
        phases=phases,
        refusals=tuple(refusals),
    )


def _engines(layout: Layout, rollouts: RolloutSetup) -> int:
    gpus = rollouts.gpus or layout.world
    if gpus % rollouts.tensor:
        raise PlanError(f"servers of {rollouts.tensor} GPUs do not divide {gpus} GPUs")
    return gpus // rollouts.tensor


def student_batch(
    a: Architecture, cluster: Cluster, layout: Layout, workload: Workload, rollouts: RolloutSetup, engines: int
) -> tuple[Batch, float]:
    """Return what each engine decodes at once, and the bytes of cache per GPU: as needed, at most what is left."""
    per_token = cache_bytes_per_token(a, rollouts.tensor)
    longest = (workload.prompt_tokens + workload.longest_response) * per_token
    # The embedded engine reserves the longest response for every sequence; servers allocate pages as tokens come.
    each = longest if rollouts.engine == "embedded" else workload.sequence_tokens * per_token
    room = cache_room(a, layout, workload, rollouts, cluster.gpu)
    sequences = workload.student_sequences / engines
    wanted = min(max(1.0, sequences), rollouts.max_concurrency)
    at_once = 0.0 if room < longest else min(wanted, room // each)
    cache = max(longest, at_once * each) if rollouts.memory_fraction is None else room
    return Batch(sequences, at_once, workload.prompts / engines, workload.prompt_tokens), cache


def layouts(
    architecture: Architecture, gpus: int, gpus_per_node: int, longest: int, base: Layout | None = None
) -> Iterator[Layout]:
    """Yield the layouts of a search.

    TP within a node, whole layers per stage, with and without recompute; context parallelism while a rank has a few
    thousand tokens of the longest sequence; whole experts over any ranks of a stage; interleaving in two or four
    chunks; the optimizer as in `base`, or on the host. base: the settings that all have in common (spec, precision,
    overlap).
    """
    base = base or Layout(overlap=True)
    stages = [p for p in range(1, min(_MOST_STAGES, architecture.num_layers) + 1) if not architecture.num_layers % p]
    for tensor, pipeline, context in product((1, 2, 4, 8), stages, (1, 2, 4, 8)):
        ranks = tensor * pipeline * context
        if tensor > gpus_per_node or gpus % ranks or (context > 1 and longest < context * _CONTEXT_TOKENS):
            continue
        split = replace(
            base, tensor=tensor, pipeline=pipeline, context=context, data=gpus // ranks, sequence=tensor > 1
        )
        for chunks, expert in product((1, 2, 4), _expert_ranks(architecture, gpus // pipeline)):
            layout = replace(split, virtual_stages=chunks, expert=expert)
            if not _possible(layout, architecture):
                continue
            for recompute, offload in product((False, True), {base.offload, 1.0}):
                yield replace(layout, recompute=recompute, offload=offload)


def _possible(layout: Layout, architecture: Architecture) -> bool:
    try:
        check(layout, architecture)
    except PlanError:
        return False
    return True


def _expert_ranks(architecture: Architecture, ranks: int) -> list[int]:
    """Return the numbers of ranks that can share the experts: powers of two, up to one expert per rank."""
    if not architecture.num_experts:
        return [1]
    sizes = (2**power for power in range(architecture.num_experts.bit_length()))
    return [n for n in sizes if not ranks % n and not architecture.num_experts % n]


@dataclass(frozen=True)
class Search:
    """Result of a search: plans that fit, fastest first, and those that do not, smallest excess first."""

    fitting: tuple[Plan, ...]
    refused: tuple[Plan, ...]


def search(
    architecture: Architecture,
    cluster: Cluster,
    workload: Workload,
    rollouts: RolloutSetup,
    base: Layout | None = None,
) -> Search:
    """Return the plans of all layouts over the cluster's GPUs.

    Servers have `rollouts.tensor` GPUs or more. base: the settings that the layouts have in common. Raises PlanError if
    no GPU is left for the trainer.
    """
    gpus = cluster.gpus - rollouts.gpus
    if gpus < 1:
        raise PlanError(f"{rollouts.gpus} rollout GPUs leave none of {cluster.gpus} GPUs for the trainer")
    made = []
    longest = workload.prompt_tokens + workload.longest_response
    for layout in layouts(architecture, gpus, cluster.gpus_per_node, longest, base):
        for servers in _servers(architecture, rollouts, cluster):
            try:
                made.append(plan(architecture, cluster, layout, workload, servers))
            except PlanError:
                continue
    fitting = sorted((p for p in made if p.fits), key=lambda p: p.step_s)
    refused = sorted((p for p in made if not p.fits), key=lambda p: _missing(p))
    return Search(tuple(fitting), tuple(refused))


def _servers(a: Architecture, rollouts: RolloutSetup, cluster: Cluster) -> Iterator[RolloutSetup]:
    yield rollouts
    if rollouts.engine == "embedded":
        return
    for tensor in (2, 4, 8):
        if rollouts.tensor < tensor <= cluster.gpus_per_node and a.num_heads % tensor == 0:
            yield replace(rollouts, tensor=tensor)


def _missing(plan: Plan) -> float:
    return max(phase.excess(plan.cluster.gpu) for phase in plan.memory.values()) / GIB
