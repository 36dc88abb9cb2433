"""What the planner says of the same rank: line by line beside what was rehearsed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from _rehearsal.setting import Setting
from megatron_hdpo.costs import memory
from megatron_hdpo.costs.cluster import GIB
from megatron_hdpo.costs.collectives import Collective, scoring_collectives, step_collectives
from megatron_hdpo.costs.flops import FORWARD, FORWARD_AND_BACKWARD, head_flops, product_flops
from megatron_hdpo.costs.launches import micro_batch_launches
from megatron_hdpo.costs.layout import Layout, Spec
from megatron_hdpo.costs.micro_batch_shape import PackedShape, Repeated

_SMALL = 64 * 2**20  # bytes of pinned memory that are inputs, not weights


@dataclass(frozen=True)
class Line:
    """One number of the plan beside the rehearsed one. unit: bytes, calls (of collectives), launches or FLOP."""

    what: str
    unit: str
    planned: float
    rehearsed: float

    @property
    def error(self) -> float | None:
        """Return the plan's error as a share of what was rehearsed; None where that is zero."""
        return self.planned / self.rehearsed - 1.0 if self.rehearsed else None

    @property
    def of_collective(self) -> bool:
        """Return whether the number is that of a kind of collectives."""
        return ": " in self.what and self.unit in ("calls", "bytes")


def lines(setting: Setting, rank: dict[str, Any]) -> list[Line]:
    """Return the comparison for one rank that got to its end. rank: what `ranks.run` told."""
    layout = replace(setting.layout, spec=rank["spec"])
    updates = [[PackedShape(**shape) for shape in update] for update in rank["updates"]]
    made = [*_memory(setting, layout, rank, updates), *_collectives(setting, layout, rank, updates)]
    made += [*_flops(setting, layout, rank, updates), *_launches(setting, layout, rank, updates)]
    return [*made, *_host(setting, layout, rank)]


def layers_note(setting: Setting, spec: Spec) -> str:
    """Return what it costs that plain torch layers run in place of Transformer Engine's; "" where they do not."""
    if spec == setting.layout.spec:
        return ""

    def peak(layers: Spec) -> float:
        layout = replace(setting.layout, spec=layers)
        phases = memory.by_phase(setting.architecture, layout, setting.workload, setting.rollouts, cache=0.0)
        return phases["training"].total / GIB

    return (
        "layers: plain torch, because Transformer Engine is not installed here; they keep more for the backward pass.\n"
        f"plan of training: {peak(spec):.1f} GiB with them, {peak(setting.layout.spec):.1f} with Transformer Engine"
    )


def last(rank: dict[str, Any], phase: str) -> dict[str, Any] | None:
    """Return the last of a rank's phases with this name: that of the second step; None if there is none."""
    return next((measured for measured in reversed(rank["phases"]) if measured["phase"] == phase), None)


def _memory(setting: Setting, layout: Layout, rank: dict[str, Any], updates: list[list[PackedShape]]) -> Iterator[Line]:
    a, stage, chunk = setting.architecture, rank["stage"], rank["head_chunk"]
    shapes = [*(shape for update in updates for shape in update), *(PackedShape(**shape) for shape in rank["scored"])]
    rows = max((shape.padded(layout).rows for shape in shapes), default=0)
    held = memory.resident(a, layout, stage) | memory.kept_between_steps(a, layout, stage, rows)
    held.pop("framework")
    if setting.rollouts.engine == "embedded":  # it has weights of its own
        held["engine weights"] = memory.engine_weights(a, setting.rollouts)
    train, teacher = last(rank, "train"), last(rank, "teacher")
    if train is None:
        return
    yield Line("memory at rest", "bytes", sum(held.values()), train["allocated"])
    if setting.rollouts.trainer_memory != "keep" and (sync := last(rank, "sync")) is not None:
        left = sum(held.values()) - sum(memory.beside_servers(held, setting.rollouts).values())
        yield Line("memory that left for servers", "bytes", left, train["allocated"] - sync["allocated"])
    if teacher is not None and rank["scored"] and setting.workload.teacher_model is None:
        scored = max((PackedShape(**shape) for shape in rank["scored"]), key=lambda shape: shape.rows)
        more = memory.scoring(a, layout, stage, Repeated(scored, 1), chunk)
        yield Line("memory, peak of teacher", "bytes", sum((held | more).values()), teacher["peak"])
    largest = max((shape for update in updates for shape in update), key=lambda shape: shape.rows)
    targets = max((shape for update in updates for shape in update), key=lambda shape: shape.targets)
    shape = replace(largest, targets=targets.targets, top_k=targets.top_k)
    more = memory.training(a, layout, stage, Repeated(shape, max(map(len, updates))), chunk)
    yield Line("memory, peak of train", "bytes", sum((held | more).values()), train["peak"])


def _collectives(
    setting: Setting, layout: Layout, rank: dict[str, Any], updates: list[list[PackedShape]]
) -> Iterator[Line]:
    a, stage, chunk = setting.architecture, rank["stage"], rank["head_chunk"]
    steps = [step_collectives(a, layout, stage, [Repeated(s, 1) for s in update], chunk) for update in updates]
    yield from _table(layout, "train", [made for step in steps for made in step], last(rank, "train"))
    if rank["scored"] and setting.workload.teacher_model is None:
        work = [Repeated(PackedShape(**shape), 1) for shape in rank["scored"]]
        made = scoring_collectives(a, layout, stage, work, chunk)
        yield from _table(layout, "teacher", made, last(rank, "teacher"))


def _table(
    layout: Layout, phase: str, collectives: Iterable[Collective], measured: dict[str, Any] | None
) -> Iterator[Line]:
    """Yield number and bytes of each kind and group of collectives on the device."""
    if measured is None:
        return
    count: Counter[tuple[str, str]] = Counter()
    size: Counter[tuple[str, str]] = Counter()
    for made in collectives:
        if made.group != "host" and layout.ranks(made.group) > 1:
            count[made.kind, made.group] += made.count
            size[made.kind, made.group] += round(made.bytes * made.count)
    found = {(kind, group): (times, total) for kind, group, times, total in measured["collectives"]}
    for key in sorted(count.keys() | found.keys()):
        times, total = found.get(key, (0, 0))
        yield Line(f"{phase}: {' '.join(key)}", "calls", count[key], times)
        yield Line(f"{phase}: {' '.join(key)}", "bytes", size[key], total)


def _flops(setting: Setting, layout: Layout, rank: dict[str, Any], updates: list[list[PackedShape]]) -> Iterator[Line]:
    """Yield the FLOPs of training's products, recomputed ones too; attention's are in kernels, which say nothing."""
    train, a = last(rank, "train"), setting.architecture
    if train is None:
        return
    shapes = [shape for update in updates for shape in update]
    layers = (FORWARD_AND_BACKWARD + FORWARD * layout.recompute) * a.num_layers / layout.pipeline
    planned = sum(shape.rows for shape in shapes) * layers * product_flops(a) / layout.tensor
    if rank["stage"] == layout.pipeline - 1:
        rows = sum(shape.responses for shape in shapes)
        padded = a.padded_vocab_size(layout.tensor) / a.vocab_size
        planned += FORWARD_AND_BACKWARD * rows * head_flops(a) * padded / layout.tensor
    yield Line("train: FLOPs of products", "FLOP", planned, train["flops"])


def _launches(
    setting: Setting, layout: Layout, rank: dict[str, Any], updates: list[list[PackedShape]]
) -> Iterator[Line]:
    """Yield the kernels of the micro-batches; rehearsed with those of the optimizer, which come once per update."""
    trained = [shape for update in updates for shape in update]
    scored = [PackedShape(**shape) for shape in rank["scored"]] if setting.workload.teacher_model is None else []
    for phase, shapes, backward in (("train", trained, True), ("teacher", scored, False)):
        if shapes and (counted := (last(rank, phase) or {}).get("launches")):
            chunk = rank["head_chunk"]
            planned = sum(
                micro_batch_launches(setting.architecture, layout, rank["stage"], shape, chunk, backward=backward)
                for shape in shapes
            )
            yield Line(f"{phase}: kernels launched", "launches", planned, counted)


def _host(setting: Setting, layout: Layout, rank: dict[str, Any]) -> Iterator[Line]:
    planned = memory.host_bytes(setting.architecture, layout, setting.workload, setting.rollouts)
    if max(planned, rank["pinned"]) > _SMALL:
        yield Line("host memory, pinned", "bytes", planned, rank["pinned"])
