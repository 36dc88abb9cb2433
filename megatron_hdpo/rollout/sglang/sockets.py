"""Connections of a process: each is an open file, of which a process may have a limited number."""

from __future__ import annotations

import os
import resource

SPARE = 512
"""Files for the rest of the process: checkpoints, logs, devices, connections of other ranks."""


def room_for(connections: int) -> int:
    """Return how many of so many connections this process may open; its limit is raised for them as far as allowed.

    Beyond the limit a connection fails, which would look like the failure of a server that is well.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = len(os.listdir("/dev/fd")) + SPARE
    if soft != resource.RLIM_INFINITY and soft < taken + connections:
        soft = taken + connections if hard == resource.RLIM_INFINITY else min(taken + connections, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == resource.RLIM_INFINITY else min(connections, max(0, soft - taken))
