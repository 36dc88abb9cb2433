"""Reserved ports for servers that cannot be given an open socket."""

from __future__ import annotations

import socket


class HeldPort:
    """A free TCP port of `host` ("" for all interfaces), reserved for one server.

    The socket is bound without SO_REUSEADDR, so no other process has or gets the port; it never listens, and sets
    SO_REUSEADDR afterwards. Linux then lets a server that sets it too, as uvicorn and torch's store do, bind and
    listen, now and after every restart, as long as this socket is open. Raises ValueError when the address has no free
    port.
    """

    def __init__(self, host: str) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._socket.bind((host, 0))
        except OSError as error:
            self._socket.close()
            raise ValueError(f"no port can be reserved on the address {host!r}: {error}") from error
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Release the port. Idempotent."""
        self._socket.close()


def node_address() -> str:
    """Return the IPv4 address under which other nodes reach this node."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Reads the routing table only: a datagram socket sends nothing on connect.
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostbyname(socket.gethostname())
