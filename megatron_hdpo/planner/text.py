"""Text of a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_hdpo.costs.cluster import GIB
from megatron_hdpo.planner.plan import Plan, Search


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table: the first column aligned to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), *map(line, rows)])


def memory_table(plan: Plan) -> str:
    """Return the table of GiB by kind and phase on the fullest GPU."""
    kinds = list(dict.fromkeys(kind for phase in plan.memory.values() for kind in phase.kinds))
    rows = [
        [kind, *(f"{phase.kinds[kind] / GIB:.2f}" if kind in phase.kinds else "" for phase in plan.memory.values())]
        for kind in kinds
    ]
    rows.append(["all", *(f"{phase.total / GIB:.2f}" for phase in plan.memory.values())])
    return table([f"GiB of {plan.cluster.gpu.memory / GIB:.1f}", *plan.memory], rows)


def time_table(plan: Plan) -> str:
    """Return the table of seconds of each phase, by cause."""
    rows = [
        [
            phase.phase,
            *(f"{s:.2f}" for s in (phase.arithmetic_s, phase.memory_s, phase.communication_s)),
            *(f"{s:.2f}" for s in (phase.host_s, phase.other_s)),
            f"{phase.bound_s:.2f}",
            f"{phase.time_s:.2f}",
            f"{phase.mfu(plan.cluster, plan.gpus):.1%}",
            f"{phase.tokens:,.0f}",
        ]
        for phase in plan.phases
    ]
    head = ["seconds", "arithmetic", "memory", "communication", "host", "other", "roofline", "time", "MFU", "tokens"]
    return table(head, rows)


def collectives_table(plan: Plan) -> str:
    """Return the table of the training phase's collectives on a rank of the first stage: number and bytes."""
    training = next(phase for phase in plan.phases if phase.phase == "training")
    count: Counter[tuple[str, str, str]] = Counter()
    size: dict[tuple[str, str, str], float] = {}
    for made in training.collectives:
        key = made.what, made.kind, made.group
        count[key] += made.count
        size[key] = size.get(key, 0.0) + made.bytes * made.count
    rows = [[what, kind, group, f"{count[what, kind, group]:,}", _bytes(size[what, kind, group])]
            for what, kind, group in count]  # fmt: skip
    return table(["first stage, one optimizer step", "kind", "group", "number", "bytes"], rows)


def _bytes(size: float) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"


def host_limits(plan: Plan) -> list[str]:
    """Return one line for each phase whose micro-batches wait for the host."""
    return [
        f"{phase.phase}: the host is the limit; a micro-batch has {phase.micro_batch.launches:,} kernels, launched in "
        f"{phase.micro_batch.host_s * 1e3:.0f} ms and run in {phase.micro_batch.gpu_s * 1e3:.0f} ms: larger "
        f"micro-batches or fewer GPUs would use them better"
        for phase in plan.phases
        if phase.host_s
    ]


def describe(plan: Plan) -> str:
    """Return the text of one plan."""
    gpu = plan.cluster.gpu
    host = f"; host memory {plan.host_bytes / GIB:.1f} GiB per GPU" if plan.host_bytes else ""
    hidden = sum(phase.hidden_s for phase in plan.phases)
    beside = f"; {hidden:.1f} s of communication hidden beside computation" if hidden else ""
    parts = [
        f"{plan.layout} on {plan.gpus} {gpu.name}; rollouts {plan.rollouts.engine}, servers of {plan.rollouts.tensor}",
        memory_table(plan),
        time_table(plan),
        collectives_table(plan),
        f"step {plan.step_s:.1f} s, {plan.tokens_per_second_per_gpu:,.0f} tokens/s/GPU of student prompts and "
        f"responses, MFU {plan.mfu:.1%}{host}{beside}",
    ]
    parts += ["\n".join(lines)] if (lines := host_limits(plan)) else []
    if plan.refusals:
        parts.append("does not fit:\n" + "\n".join(f"  {line}" for line in plan.refusals))
    return "\n\n".join(parts)


def ranking(found: Search, count: int = 5) -> str:
    """Return the text of the fastest layouts that fit, and of those with the smallest excess, with the reason."""
    rows = [_row(plan) for plan in found.fitting[:count]]
    parts = [f"{len(found.fitting)} layouts fit, {len(found.refused)} do not"]
    if rows:
        parts.append(table(["fastest", "servers", "step s", "tokens/s/GPU", "training MFU", "fullest GiB"], rows))
    for plan in found.refused[:count]:
        parts.append(f"{plan.layout}, servers of {plan.rollouts.tensor}: {plan.refusals[0]}")
    return "\n".join(parts)


def _row(plan: Plan) -> list[str]:
    training = next(phase for phase in plan.phases if phase.phase == "training")
    fullest = max(phase.total for phase in plan.memory.values())
    return [
        str(plan.layout),
        f"of {plan.rollouts.tensor}",
        f"{plan.step_s:.1f}",
        f"{plan.tokens_per_second_per_gpu:,.0f}",
        f"{training.mfu(plan.cluster, plan.gpus):.1%}",
        f"{fullest / GIB:.1f}",
    ]
