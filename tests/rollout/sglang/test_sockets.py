"""The number of connections that a process may open bounds the samples in flight."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Iterator

import pytest
from fault_proxy import serving
from one_engine import one_engine
from stand_in_server import StandIn

from megatron_hdpo.rollout.sglang.sockets import SPARE, room_for


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    """This process's limits of open files, set back afterwards. A test may lower the soft one only."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_is_raised_as_far_as_needed(limits: tuple[int, int]) -> None:
    taken = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + SPARE, limits[1]))
    assert room_for(100) == 100
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert taken + SPARE + 90 <= soft <= taken + SPARE + 110 and hard == limits[1]
    assert room_for(50) == 50
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == soft, "it is not lowered"


def test_beyond_the_hard_limit_fewer_fit(limits: tuple[int, int]) -> None:
    assert limits[1] != resource.RLIM_INFINITY, "a limit of files is always finite on Linux"
    assert 0 < room_for(2 * limits[1]) < limits[1]


def test_an_engine_has_no_more_samples_in_flight_than_files(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("megatron_hdpo.rollout.sglang.engine.room_for", lambda connections: 21)
    with (
        caplog.at_level(logging.WARNING),
        serving(StandIn()) as first,
        serving(StandIn()) as second,
        one_engine([first.url, second.url], max_concurrency=64, gate=False, stream_interval=0) as (engine, _),
    ):
        assert engine._dispatcher.limit == 10
    (line,) = [message for message in caplog.messages if "max_concurrency" in message]
    assert (
        "max_concurrency: 64 samples on each of 2 servers" in line and "10 are in flight" in line and "ulimit" in line
    )
