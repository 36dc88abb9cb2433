"""Collectives of expert parallelism on gloo ranks give the values that NCCL would give."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from distributed_helper import run_ranks

from megatron_hdpo.parallel.context import start
from megatron_hdpo.parallel.cpu import MegatronOnCpu
from megatron_hdpo.parallel.layout import ParallelConfig

RANKS = 3
ROWS = [2, 0, 3]
"""Rows of each rank."""


def _part(rank: int) -> torch.Tensor:
    return torch.arange(ROWS[rank] * 2, dtype=torch.float32).view(-1, 2) + 100 * rank


def _collectives() -> None:
    group = start(ParallelConfig(timeout_minutes=1.0), device="cpu").groups.dp
    rank = group.rank()
    with MegatronOnCpu():  # which puts them in the place of torch's
        _unequal_parts(rank, group)
        _equal_parts(rank, group)
        _to_all(rank, group)


def _unequal_parts(rank: int, group: dist.ProcessGroup) -> None:
    whole = torch.full((sum(ROWS), 2), float("nan"))
    dist.all_gather(list(whole.split(ROWS)), _part(rank), group=group)
    assert torch.equal(whole, torch.cat([_part(r) for r in range(RANKS)]))
    sent = (torch.arange(sum(ROWS) * 2.0).view(-1, 2) + 1000 * rank).contiguous()
    before, received = sent.clone(), torch.empty(ROWS[rank], 2)
    dist.reduce_scatter(received, list(sent.split(ROWS)), group=group)
    total = sum(torch.arange(sum(ROWS) * 2.0).view(-1, 2) + 1000 * r for r in range(RANKS))
    assert torch.equal(received, total.split(ROWS)[rank])
    assert torch.equal(sent, before)


def _equal_parts(rank: int, group: dist.ProcessGroup) -> None:
    parts = [torch.empty(2) for _ in range(RANKS)]
    dist.all_gather(parts, torch.full((2,), float(rank)), group=group)
    assert [part.tolist() for part in parts] == [[r, r] for r in range(RANKS)]
    received = torch.empty(2)
    dist.reduce_scatter(received, [torch.full((2,), float(10 * r + rank)) for r in range(RANKS)], group=group)
    assert received.tolist() == [30.0 * rank + 3] * 2


def _to_all(rank: int, group: dist.ProcessGroup) -> None:
    """Rank r sends r x 10 + d, once for each row of rank d; the numbers of rows as Megatron has them."""
    sent = torch.cat([torch.full((ROWS[d],), 10.0 * rank + d) for d in range(RANKS)])
    expected = [10.0 * r + rank for r in range(RANKS) for _ in range(ROWS[rank])]
    for own, mine in ((torch.tensor(ROWS), torch.tensor([ROWS[rank]] * RANKS)), (np.array(ROWS), [ROWS[rank]] * RANKS)):
        received = torch.empty(ROWS[rank] * RANKS)
        dist.all_to_all_single(received, sent, output_split_sizes=mine, input_split_sizes=own, group=group)
        assert received.tolist() == expected
    same = torch.empty(RANKS)
    dist.all_to_all_single(same, torch.arange(3.0) + 10 * rank, group=group)
    assert same.tolist() == [10.0 * r + rank for r in range(RANKS)]


def test_collectives_of_unequal_parts() -> None:
    run_ranks(RANKS, _collectives)
