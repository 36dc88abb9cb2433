"""Errors of generation and checking: each kind once in the log, with counts."""

from __future__ import annotations

import logging

import pytest

from megatron_hdpo.sampling.failures import MOST_KINDS, Failure, Failures


def test_each_kind_is_logged_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    failures = Failures()
    with caplog.at_level(logging.INFO):
        for step in range(2):
            for place in range(3):
                failures.add(f"generation failed: sample {place}:\n refused", f"task/{place}")
            failures.add("check failed: KeyError: 'x'", "task/9")
            assert failures.take() == [
                Failure("generation failed: sample 0: refused", 3),
                Failure("check failed: KeyError: 'x'", 1),
            ], step
    assert [record.getMessage().partition(" (problem ")[0] for record in caplog.records] == [
        "generation failed: sample 0: refused",
        "check failed: KeyError: 'x'",
    ]
    assert not failures.take()


def test_errors_without_end_are_told_apart_only_so_far(caplog: pytest.LogCaptureFixture) -> None:
    failures = Failures()
    with caplog.at_level(logging.INFO):
        for number in range(2 * MOST_KINDS):
            failures.add("error " + "x" * number, "task/1")
    taken = failures.take()
    assert sum(failure.count for failure in taken) == 2 * MOST_KINDS
    assert len(taken) == len(caplog.records) == MOST_KINDS + 1
