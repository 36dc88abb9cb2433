"""Weak and strong scaling: the fastest layout that fits, for every number of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_hdpo.costs.cluster import Cluster, Gpu
from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.costs.workload import RolloutSetup, Workload
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.planner.plan import Plan, search

NODE = 8


@dataclass(frozen=True)
class Point:
    """The best plan for a number of GPUs, or the reason why there is none."""

    gpus: int
    prompts: int
    plan: Plan | None
    refusal: str

    def row(self) -> dict[str, object]:
        """Return the point as a JSON object."""
        head: dict[str, object] = {"gpus": self.gpus, "prompts": self.prompts}
        if self.plan is None:
            return head | {"fits": False, "why_not": self.refusal}
        plan = self.plan
        phases = {phase.phase: round(phase.time_s, 4) for phase in plan.phases}
        return head | {
            "fits": True,
            "layout": str(plan.layout),
            "server_gpus": plan.rollouts.tensor,
            "step_s": round(plan.step_s, 3),
            "tokens_per_s_per_gpu": round(plan.tokens_per_second_per_gpu, 2),
            "mfu": round(plan.mfu, 5),
            "phases_s": phases,
            "fullest_gib": round(max(memory.total for memory in plan.memory.values()) / 2**30, 2),
        }


def weak(
    architecture: Architecture,
    gpu: Gpu,
    counts: Sequence[int],
    workload: Workload,
    rollouts: RolloutSetup,
    base: Layout | None = None,
) -> list[Point]:
    """Return the best plans for work that grows with the GPUs: `workload.prompts` for each GPU.

    base: settings that all layouts share.
    """
    grown = [replace(workload, prompts=workload.prompts * n) for n in counts]
    return [
        _best(architecture, gpu, n, work, rollouts=rollouts, base=base) for n, work in zip(counts, grown, strict=True)
    ]


def strong(
    architecture: Architecture,
    gpu: Gpu,
    counts: Sequence[int],
    workload: Workload,
    rollouts: RolloutSetup,
    base: Layout | None = None,
) -> list[Point]:
    """Return the best plans for the same work on growing numbers of GPUs. base: settings that all layouts share."""
    return [_best(architecture, gpu, n, workload, rollouts=rollouts, base=base) for n in counts]


def _best(
    architecture: Architecture, gpu: Gpu, gpus: int, workload: Workload, rollouts: RolloutSetup, base: Layout | None
) -> Point:
    found = search(architecture, Cluster(gpu, gpus // NODE, NODE), workload, rollouts, base)
    if found.fitting:
        return Point(gpus, workload.prompts, found.fitting[0], "")
    why = (
        f"{found.refused[0].layout}: {found.refused[0].refusals[0]}" if found.refused else "no layout divides the model"
    )
    return Point(gpus, workload.prompts, None, why)
