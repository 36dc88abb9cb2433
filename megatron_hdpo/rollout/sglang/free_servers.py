"""Servers with a free slot, ordered by what they have to do."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_hdpo.rollout.sglang.replica import Replica


class FreeServers:
    """Servers with a free slot; iteration begins with the idlest, of equal ones with the one that is so for longest.

    Putting one in its place and finding the idlest takes the same time for any number of servers. limit: slots of each.
    """

    def __init__(self, limit: int) -> None:
        self._by_load: list[dict[int, Replica]] = [{} for _ in range(limit)]
        self._loads: dict[int, int] = {}
        self._least = 0

    def put(self, replica: Replica, has_room: bool) -> None:
        """Put a server where its number of samples belongs, or take it out when it has no room for another one."""
        load, before = replica.taken if has_room else None, self._loads.get(replica.index)
        if load == before:
            return
        if before is not None:
            del self._by_load[before][replica.index], self._loads[replica.index]
        if load is not None:
            self._by_load[load][replica.index] = replica
            self._loads[replica.index] = load
            self._least = min(self._least, load)

    def __contains__(self, replica: Replica) -> bool:
        return replica.index in self._loads

    def __iter__(self) -> Iterator[Replica]:
        while self._least < len(self._by_load) - 1 and not self._by_load[self._least]:
            self._least += 1
        for load in range(self._least, len(self._by_load)):
            yield from self._by_load[load].values()
