"""Stream of a Megatron model's weights as full Hugging Face tensors, gathered one bucket of bounded size at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.errors import WeightsError
from megatron_hdpo.weights.mapping import ParameterShard, Slot, all_slots, shard_of
from megatron_hdpo.weights.parameters import Bound, bind, sharing_group

Receivers = Literal["all", "leader", "first"]
"""all: every rank; leader: the first rank of every data-parallel replica; first: only the first rank of the run."""


def stream_hf(
    model: nn.Module,
    architecture: Architecture,
    context: ParallelContext,
    *,
    to: Receivers = "all",
    bucket_bytes: int = 32 * 2**20,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor) for every tensor of the checkpoint, each once.

    The order is the same on every layout, except that the order of a layer's experts depends on the number of
    expert-parallel ranks. Padded vocabulary rows and a tied head are not exported. The values are the exact bits of the
    parameters, in their type, on the run's device; the receiver may keep the tensors.

    Collective within a data-parallel replica: each of its ranks must iterate to the end, also those that receive
    nothing. Replicas are independent of each other unless they share experts (expert x expert_tensor ranks beyond
    tensor x context); replicas that share experts must stream together.

    to: "all" gives every rank everything (an engine on each rank); "leader" only the first rank of each replica;
    "first" only rank 0, and then every rank of the run must iterate.
    bucket_bytes: tensors are exchanged in buckets of at most this size. A larger parameter is exchanged alone; for
    experts that means together with the parameters of the same name on the other expert-parallel ranks. A receiver
    holds about two buckets in addition to its own shard.
    Raises WeightsError if ranks that must hold the same values (norms over TP, tied embeddings over PP) do not.
    """
    gatherer = WeightGatherer(model, architecture, context, to=to, bucket_bytes=bucket_bytes)
    for bucket in gatherer.buckets:
        yield from gatherer.gather(bucket)


@dataclass(frozen=True)
class WeightBucket:
    """Consecutive parameters of one stage that are exchanged together.

    If a pipeline rank has several chunks of layers, each chunk is a stage.
    """

    stage: int
    slots: tuple[Slot, ...]

    @property
    def numel(self) -> int:
        """Number of elements of its full Hugging Face tensors."""
        return sum(math.prod(source.shape) for slot in self.slots for source in slot.sources)

    def goes_with(self, other: WeightBucket) -> bool:
        """Return whether the parameters of both buckets are shared by the same ranks."""
        return (self.stage, self.slots[0].expert_ranks) == (other.stage, other.slots[0].expert_ranks)


class WeightGatherer:
    """The steps of `stream_hf`, for callers that must act on every rank between buckets; same rules and errors."""

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        context: ParallelContext,
        *,
        to: Receivers,
        bucket_bytes: int = 32 * 2**20,
    ) -> None:
        self.architecture, self.context, self.to = architecture, context, to
        self.bound: Bound = bind(model, architecture, context)
        self.dtype = _common_dtype(self.bound, context)
        stages = context.groups.pp.size() * context.layout.virtual_stages
        limit = bucket_bytes // self.dtype.itemsize
        self.buckets = plan_buckets(all_slots(architecture, stages, context.layout.expert), limit)

    def gather(self, bucket: WeightBucket) -> Iterator[tuple[str, Tensor]]:
        """Exchange one bucket now; return an iterator over its (name, full tensor) pairs, empty on non-receivers."""
        owner = bucket.stage % self.context.groups.pp.size()
        group = sharing_group(bucket.slots[0], self.context)
        places = _receiving_places(group, self.context, self.to)
        if not places:
            return iter(())
        flat = self._local_shards(bucket, owner, group)
        if self.to == "all":
            _to_all_stages(flat, owner, self.context)
            self._check_tied_copy(bucket, flat)
        elif not _to_first_stage(flat, owner, self.context):
            return iter(())
        gathered = _join(flat, group, places)
        return iter(()) if gathered is None else _assemble(self.architecture, bucket, gathered)

    def _local_shards(self, bucket: WeightBucket, owner: int, group: dist.ProcessGroup) -> Tensor:
        """Return the bucket's shards in one flat tensor: filled on the owning stage, uninitialised elsewhere."""
        sizes = [shard_of(self.architecture, slot, group.size(), group.rank()).numel for slot in bucket.slots]
        flat = torch.empty(sum(sizes), dtype=self.dtype, device=self.context.device)
        if self.context.groups.pp.rank() == owner:
            for slot, part in zip(bucket.slots, flat.split(sizes), strict=True):
                part.copy_(self.bound[slot][0].detach().reshape(-1))
        return flat

    def _check_tied_copy(self, bucket: WeightBucket, flat: Tensor) -> None:
        """Raise WeightsError if the streamed embedding differs from the last stage's copy of it."""
        for copy, (parameter, _) in self.bound.items():
            # The embedding is the first parameter of the first bucket.
            if not copy.duplicate or bucket.slots[0].sources != copy.sources:
                continue
            if not same_bits(flat[: parameter.numel()], parameter.detach().view(-1)):
                name = copy.sources[0].name
                raise WeightsError(
                    f"rank {self.context.rank}: the last stage's copy of {name} differs from the first stage's"
                )


def plan_buckets(slots: Iterable[tuple[int, Slot]], limit: int) -> list[WeightBucket]:
    """Group (stage, slot) pairs into buckets, in their order.

    A bucket has at most `limit` elements in full, or one parameter with more; all its parameters are shared by the same
    ranks.
    """
    buckets: list[WeightBucket] = []
    for stage, slot in slots:
        alone = WeightBucket(stage, (slot,))
        if buckets and buckets[-1].goes_with(alone) and buckets[-1].numel + alone.numel <= limit:
            buckets[-1] = WeightBucket(stage, (*buckets[-1].slots, slot))
        else:
            buckets.append(alone)
    return buckets


def _receiving_places(group: dist.ProcessGroup, context: ParallelContext, to: Receivers) -> list[int]:
    """Return the group ranks of the receivers (on the first stage only, unless all ranks receive)."""
    per_stage = context.world_size // context.groups.pp.size()
    step = {"all": 1, "leader": context.groups.tp.size() * context.groups.cp.size(), "first": per_stage}[to]
    ranks = dist.get_process_group_ranks(group)
    return [place for place, rank in enumerate(ranks) if rank % per_stage % step == 0]


def _common_dtype(bound: Bound, context: ParallelContext) -> torch.dtype:
    dtypes = {parameter.dtype for parameter, _ in bound.values()}
    if len(dtypes) != 1:
        raise WeightsError(f"rank {context.rank}: parameters of several types {sorted(map(str, dtypes))}; expected one")
    return dtypes.pop()


def _to_all_stages(flat: Tensor, owner: int, context: ParallelContext) -> None:
    if context.groups.pp.size() > 1:
        dist.broadcast(flat, group=context.groups.pp, group_src=owner)


def _to_first_stage(flat: Tensor, owner: int, context: ParallelContext) -> bool:
    """Send the values to the first stage; return whether this rank belongs to it."""
    pp = context.groups.pp
    if owner > 0 and pp.rank() == owner:
        dist.send(flat, group=pp, group_dst=0)
    if owner > 0 and pp.rank() == 0:
        dist.recv(flat, group=pp, group_src=owner)
    return pp.rank() == 0


def _join(flat: Tensor, group: dist.ProcessGroup, places: Sequence[int]) -> Tensor | None:
    """Gather the shards of all ranks of the group, [ranks, elements], on the group ranks `places`; None elsewhere."""
    if group.size() == 1:
        return flat[None]
    gathered = flat.new_empty(group.size(), len(flat)) if group.rank() in places else None
    if len(places) == group.size():
        dist.all_gather_into_tensor(gathered.view(-1), flat, group=group)  # type: ignore[union-attr]
        return gathered
    for place in places:
        into = list(gathered) if gathered is not None and place == group.rank() else None
        dist.gather(flat, into, group=group, group_dst=place)
    return gathered


def _assemble(architecture: Architecture, bucket: WeightBucket, gathered: Tensor) -> Iterator[tuple[str, Tensor]]:
    offset = 0
    for slot in bucket.slots:
        shards = [shard_of(architecture, slot, len(gathered), rank) for rank in range(len(gathered))]
        numel = shards[0].numel
        parts = [row[offset : offset + numel].view(shards[0].shape) for row in gathered]
        offset += numel
        for source, full in zip(slot.sources, _full_tensors(slot, shards, parts), strict=True):
            yield source.name, full


def _full_tensors(slot: Slot, shards: list[ParameterShard], parts: list[Tensor]) -> list[Tensor]:
    if slot.split == "copy":
        if any(not same_bits(part, parts[0]) for part in parts[1:]):
            raise WeightsError(f"{slot.sources[0].name} differs between tensor-parallel ranks, which must hold copies")
        return [parts[0].clone()]
    full = [parts[0].new_empty(source.shape) for source in slot.sources]
    for shard, part in zip(shards, parts, strict=True):
        lengths = [*map(len, shard.pieces), shard.padding]
        for piece, values in zip(shard.pieces, part.split(lengths, dim=shard.dim), strict=False):
            full[piece.source].narrow(shard.dim, piece.start, len(piece)).copy_(values)
    return full


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are bitwise equal (NaN equals the same NaN); checking for NaN is the caller's job."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
