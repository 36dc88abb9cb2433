"""Background saving of rollouts: what is written, what stays, and what is said when the disk does not take it."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rollout_groups import group

from megatron_hdpo.sampling import saver as saver_module
from megatron_hdpo.sampling.saved import read_share, step_file, step_files
from megatron_hdpo.sampling.saver import MOST_WAITING, NotSaved, RolloutSaver
from megatron_hdpo.sampling.step_rollouts import StepRollouts
from megatron_hdpo.types.rollouts import outline_of


def rollouts(*holders: int | None, rank: int = 0) -> StepRollouts:
    """A step with one group per holder."""
    groups = [group([1.0, 0.0], problem=f"sums/{i}") for i in range(len(holders))]
    held = {i: groups[i] for i, holder in enumerate(holders) if holder in (rank, None)}
    return StepRollouts(list(map(outline_of, groups)), list(holders), held)


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[RolloutSaver]:
    made = RolloutSaver(tmp_path, 0, str, keep=None)
    yield made
    made.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_each_rank_writes_what_it_holds_and_together_they_are_the_step(tmp_path: Path) -> None:
    for rank in (0, 1, 2):
        each = RolloutSaver(tmp_path, rank, str)
        each.save(3, rollouts(0, 1, 0, 1, rank=rank))
        each.close()
    assert names(tmp_path) == [step_file(3, 0), step_file(3, 1)], "rank 2 holds nothing and writes nothing"
    read = read_share(step_files(tmp_path, 3), 0, 1)
    assert {index: found.problem.id for index, found in read.items()} == {i: f"sums/{i}" for i in range(4)}


def test_files_of_an_earlier_try_on_more_ranks_do_not_stay(tmp_path: Path, saver: RolloutSaver) -> None:
    """A run that is resumed on fewer ranks repeats the step: the files of the ranks that are gone are not its own."""
    (tmp_path / "step_00000002.jsonl").touch()
    (tmp_path / step_file(2, 5)).touch()
    (tmp_path / step_file(2, 1)).write_bytes(b"rank 1 may have written already")
    (tmp_path / step_file(1, 5)).touch()
    saver.save(2, rollouts(0, 1))
    saver.flush()
    assert names(tmp_path) == [step_file(1, 5), step_file(2, 0), step_file(2, 1)]


def test_only_the_newest_steps_stay(tmp_path: Path) -> None:
    keeps = RolloutSaver(tmp_path, 0, str, keep=2)
    for step in range(1, 6):
        keeps.save(step, rollouts(0))
    keeps.close()
    assert names(tmp_path) == [step_file(4, 0), step_file(5, 0)]


@pytest.mark.fault(
    "no room for the rollouts of a step",
    phase="saving rollouts",
    seen="`rollout/save_failed` and a warning with step and reason",
    lost="these saved rollouts; training goes on",
)
def test_a_full_disk_is_counted_and_said_and_the_next_step_is_saved(
    tmp_path: Path, saver: RolloutSaver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original, full = saver_module.write_groups, [True]

    def write(path: Path, *arguments: Any) -> None:
        if full.pop() if full else False:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(path, *arguments)

    monkeypatch.setattr(saver_module, "write_groups", write)
    saver.save(1, rollouts(0, 0, 0))
    saver.save(2, rollouts(0))
    saver.flush()
    assert names(tmp_path) == [step_file(2, 0)]
    lost = saver.take_not_saved()
    assert lost.groups == 3 and "step 1" in lost.reason and "No space left on device" in lost.reason
    assert saver.take_not_saved() == NotSaved(), "each is told once"
    assert "the rollouts of step 1 are not saved" in caplog.text


def test_a_reward_that_is_no_number_is_counted_too(saver: RolloutSaver) -> None:
    bad = rollouts(0, 0)
    bad.held[1].samples[0].reward = float("nan")
    saver.save(1, bad)
    saver.flush()
    assert saver.take_not_saved().groups == 2


@pytest.mark.fault("the disk is slow", phase="saving rollouts", seen="longer steps", lost="nothing")
def test_steps_wait_for_a_slow_disk_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer goes on while two steps wait; with the third it waits. The end of the run writes them all."""
    original, go_on = saver_module.write_groups, threading.Event()

    def write(*arguments: Any) -> None:
        go_on.wait(timeout=60)
        original(*arguments)

    monkeypatch.setattr(saver_module, "write_groups", write)
    slow = RolloutSaver(tmp_path, 0, lambda ids: str(np.asarray(ids)))
    for step in range(1, MOST_WAITING + 1):
        slow.save(step, rollouts(0))
    third = threading.Thread(target=slow.save, args=(MOST_WAITING + 1, rollouts(0)))
    third.start()
    third.join(timeout=0.3)
    assert third.is_alive() and names(tmp_path) == []
    go_on.set()
    third.join(timeout=60)
    slow.close()
    assert names(tmp_path) == [step_file(step, 0) for step in range(1, MOST_WAITING + 2)]
