"""Held ports: nobody else gets one, and the server it is for does, again and again."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from torch.distributed import TCPStore

from megatron_hdpo.rollout.sglang.servers.ports import HeldPort, node_address


def listen(host: str, port: int) -> socket.socket:
    """As uvicorn listens."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((host, port))
    server.listen()
    return server


def test_a_held_port_is_free_for_its_server_over_restarts_and_for_no_one_else() -> None:
    port = HeldPort("127.0.0.1")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port.number))
    for _ in range(2):
        with listen("127.0.0.1", port.number) as server, socket.create_connection(("127.0.0.1", port.number)):
            server.accept()[0].close()
    port.close()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port.number))
    port.close()


def test_a_store_of_torch_listens_on_a_held_port_of_all_interfaces() -> None:
    port = HeldPort("")
    store = TCPStore("127.0.0.1", port.number, is_master=True)
    store.set("key", "value")
    assert store.get("key") == b"value"
    port.close()


def test_held_ports_differ() -> None:
    ports = [HeldPort("127.0.0.1") for _ in range(50)]
    assert len({port.number for port in ports}) == 50
    for port in ports:
        port.close()


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"192\.0\.2\.1"):
        HeldPort("192.0.2.1")


def test_the_node_has_an_address_one_can_listen_on() -> None:
    address = node_address()
    ipaddress.IPv4Address(address)
    HeldPort(address).close()
