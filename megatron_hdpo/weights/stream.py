"""A Megatron model's weights as a stream of full Hugging Face tensors, gathered a bounded bucket at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.errors import WeightsError
from megatron_hdpo.weights.mapping import Shard, Slot, all_slots, shard_of
from megatron_hdpo.weights.parameters import Bound, bind

Receivers = Literal["all", "leader"]


def stream_hf(
    model: nn.Module,
    architecture: Architecture,
    context: ParallelContext,
    *,
    to: Receivers = "all",
    bucket_bytes: int = 32 * 2**20,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor) for every tensor of the checkpoint, once, in one order on every layout.

    Collective within a data-parallel replica: each of its ranks must iterate to the end, also those that are given
    nothing. Replicas are independent of each other. The values are the parameters' exact bits, in their type, on the
    run's device; the tensors are the receiver's own. Padded vocabulary rows and a tied head are not exported.

    to: "all" gives every rank everything (an engine on each rank); "leader" only the replica's first rank.
    bucket_bytes: tensors are exchanged in buckets of at most this size; a larger tensor goes alone. A receiver holds
    about two buckets beside its own shard.
    Raises WeightsError where ranks that must hold the same values (norms over TP, tied embeddings over PP) do not.
    """
    gatherer = WeightGatherer(model, architecture, context, to=to, bucket_bytes=bucket_bytes)
    for bucket in gatherer.buckets:
        yield from gatherer.gather(bucket)


@dataclass(frozen=True)
class Bucket:
    """Consecutive parameters of one stage (of a pipeline rank's chunk, where it has several) that are exchanged
    together."""

    stage: int
    slots: tuple[Slot, ...]

    @property
    def numel(self) -> int:
        """Elements of its full Hugging Face tensors."""
        return sum(math.prod(source.shape) for slot in self.slots for source in slot.sources)


class WeightGatherer:
    """The steps of `stream_hf`, for callers that must act between buckets on every rank; same contract."""

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
        self.buckets = plan_buckets(architecture, stages, bucket_bytes // self.dtype.itemsize)

    def gather(self, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
        """Exchange one bucket now; the result yields its (name, full tensor) pairs, or nothing on a non-receiver."""
        flat = self._local_shards(bucket)
        owner = bucket.stage % self.context.groups.pp.size()
        gathered = (_to_all if self.to == "all" else _to_leader)(flat, owner, self.context)
        if self.to == "all":
            self._check_tied_copy(bucket, flat)
        if gathered is None or not is_receiver(self.context, self.to):
            return iter(())
        return _assemble(self.architecture, bucket, gathered)

    def _local_shards(self, bucket: Bucket) -> Tensor:
        """The bucket's shards back to back, [their elements]: values on the stage that owns them, room elsewhere."""
        tp = self.context.groups.tp
        sizes = [shard_of(self.architecture, slot, tp.size(), tp.rank()).numel for slot in bucket.slots]
        flat = torch.empty(sum(sizes), dtype=self.dtype, device=self.context.device)
        if self.context.groups.pp.rank() == bucket.stage % self.context.groups.pp.size():
            for slot, part in zip(bucket.slots, flat.split(sizes), strict=True):
                part.copy_(self.bound[slot][0].detach().reshape(-1))
        return flat

    def _check_tied_copy(self, bucket: Bucket, flat: Tensor) -> None:
        """The embedding that passes by must be the last stage's own copy of it."""
        for copy, (parameter, _) in self.bound.items():
            # The embedding opens the first bucket.
            if not copy.duplicate or bucket.slots[0].sources != copy.sources:
                continue
            if not same_bits(flat[: parameter.numel()], parameter.detach().view(-1)):
                name = copy.sources[0].name
                raise WeightsError(
                    f"rank {self.context.rank}: the last stage's copy of {name} differs from the first stage's"
                )


def plan_buckets(architecture: Architecture, stages: int, limit: int) -> list[Bucket]:
    """Buckets in stream order: each at most `limit` elements in full, or one parameter that has more."""
    buckets: list[Bucket] = []
    for stage, slot in all_slots(architecture, stages):
        alone = Bucket(stage, (slot,))
        if buckets and buckets[-1].stage == stage and buckets[-1].numel + alone.numel <= limit:
            buckets[-1] = Bucket(stage, (*buckets[-1].slots, slot))
        else:
            buckets.append(alone)
    return buckets


def is_receiver(context: ParallelContext, to: Receivers) -> bool:
    """Whether `stream_hf(to=...)` yields tensors on this rank."""
    return to == "all" or context.is_replica_leader


def _common_dtype(bound: Bound, context: ParallelContext) -> torch.dtype:
    dtypes = {parameter.dtype for parameter, _ in bound.values()}
    if len(dtypes) != 1:
        raise WeightsError(f"rank {context.rank}: parameters of several types {sorted(map(str, dtypes))}; expected one")
    return dtypes.pop()


def _to_all(flat: Tensor, owner: int, context: ParallelContext) -> Tensor:
    """Shards of all tensor-parallel ranks, [TP, elements], on every rank. PP moves shards, TP then joins them."""
    tp, pp = context.groups.tp, context.groups.pp
    if pp.size() > 1:
        dist.broadcast(flat, group=pp, group_src=owner)
    if tp.size() == 1:
        return flat[None]
    gathered = flat.new_empty(tp.size() * len(flat))
    dist.all_gather_into_tensor(gathered, flat, group=tp)
    return gathered.view(tp.size(), -1)


def _to_leader(flat: Tensor, owner: int, context: ParallelContext) -> Tensor | None:
    """Shards of all tensor-parallel ranks, [TP, elements], on the replica's first rank; None elsewhere."""
    tp, pp = context.groups.tp, context.groups.pp
    if owner > 0 and pp.rank() == owner:
        dist.send(flat, group=pp, group_dst=0)
    if pp.rank() > 0:
        return None
    if owner > 0:
        dist.recv(flat, group=pp, group_src=owner)
    if tp.size() == 1:
        return flat[None]
    gathered = flat.new_empty(tp.size(), len(flat)) if tp.rank() == 0 else None
    dist.gather(flat, None if gathered is None else list(gathered), group=tp, group_dst=0)
    return gathered


def _assemble(architecture: Architecture, bucket: Bucket, gathered: Tensor) -> Iterator[tuple[str, Tensor]]:
    offset = 0
    for slot in bucket.slots:
        shards = [shard_of(architecture, slot, len(gathered), rank) for rank in range(len(gathered))]
        numel = shards[0].numel
        parts = [row[offset : offset + numel].view(shards[0].shape) for row in gathered]
        offset += numel
        for source, full in zip(slot.sources, _full_tensors(slot, shards, parts), strict=True):
            yield source.name, full


def _full_tensors(slot: Slot, shards: list[Shard], parts: list[Tensor]) -> list[Tensor]:
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
    """Equality that takes a NaN for equal to the same NaN: broken weights are to be found by who looks for them."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
