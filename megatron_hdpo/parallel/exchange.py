"""Messages of bytes from rank to rank: each is as long as it is, and no other rank receives or stores it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist

_LARGEST_PIECE = 2**30
"""Bytes of the pieces that a message is sent in."""


def exchange(outgoing: Mapping[int, np.ndarray], group: dist.ProcessGroup) -> dict[int, np.ndarray]:
    """Send a message to each rank that `outgoing` names; return the messages to this rank by sender.

    Messages are uint8 [bytes], not empty, and may be the same array for several ranks, which is not copied. Ranks count
    within the group, whose backend is gloo. Collective over the group.
    """
    senders = _lengths({rank: len(message) for rank, message in outgoing.items()}, group)
    incoming = {rank: np.empty(length, dtype=np.uint8) for rank, length in senders.items()}
    pending = [
        dist.irecv(piece, group_src=rank, group=group)
        for rank, message in incoming.items()
        for piece in torch.from_numpy(message).split(_LARGEST_PIECE)
    ]
    pending += [
        dist.isend(piece, group_dst=rank, group=group)
        for rank, message in outgoing.items()
        for piece in torch.from_numpy(message).split(_LARGEST_PIECE)
    ]
    for work in pending:
        assert work is not None, "this rank is in the group"
        work.wait()
    return incoming


def _lengths(outgoing: Mapping[int, int], group: dist.ProcessGroup) -> dict[int, int]:
    """Return how long the messages to this rank are, by sender, from the lengths of those that it sends."""
    sent = torch.tensor([outgoing.get(rank, 0) for rank in range(group.size())])
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return {rank: length for rank, length in enumerate(received.tolist()) if length}
