"""The rollout phase on several ranks: rollouts that no disk took, and saved ones that cannot be read."""

from __future__ import annotations

import gzip
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rollout_groups import group, sample
from thread_ranks import Context, World

from megatron_hdpo.model.policy import TrainingError
from megatron_hdpo.sampling.saved import step_file, write_groups
from megatron_hdpo.sampling.saver import NotSaved
from megatron_hdpo.training.rollout_phase import _replayed, check_versions, flush_saved_rollouts, rollout_metrics
from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.rollouts import Completion, Sample, outline_of


def test_rollouts_that_no_disk_took_are_counted_over_the_ranks_and_said() -> None:
    lost = [NotSaved(), NotSaved(3, "step 7: [Errno 28] No space left on device"), NotSaved(2, "step 7: other")]

    def flushed(context: Any) -> list[str]:
        said: list[str] = []
        saver = SimpleNamespace(flush=lambda: None, take_not_saved=lambda: lost[context.rank])
        run: Any = SimpleNamespace(context=context, saver=saver, console=SimpleNamespace(warn=said.append))
        flush_saved_rollouts(run)
        return said

    text = "rollouts of 5 groups could not be saved: step 7: [Errno 28] No space left on device"
    assert World(3).run(flushed) == [[text]] * 3


def replaying(context: Context, folder: Path) -> Any:
    rollout = SimpleNamespace(routing_replay=False)
    architecture = SimpleNamespace(num_layers=2, experts_per_token=2)
    recipe = SimpleNamespace(rollout=rollout)
    return _replayed(folder, SimpleNamespace(context=context, step=0, recipe=recipe, architecture=architecture))  # type: ignore[arg-type]


def test_each_rank_reads_its_share_of_a_replayed_step(tmp_path: Path) -> None:
    groups = [group([1.0, 0.0], problem=f"sums/{i}") for i in range(5)]
    write_groups(tmp_path / step_file(1, 3), dict(enumerate(groups)), 5, str)
    parts = World(2).run(lambda context: replaying(context, tmp_path))
    assert [part.outlines for part in parts] == [list(map(outline_of, groups))] * 2
    assert [sorted(part.held) for part in parts] == [[0, 2, 4], [1, 3]]
    assert parts[0].holders == parts[1].holders == [0, 1, 0, 1, 0]


def test_every_rank_ends_when_one_cannot_read_its_share(tmp_path: Path) -> None:
    """The broken line is the second rank's: the first would wait for it."""
    groups = {i: group([1.0], problem=f"sums/{i}") for i in range(2)}
    write_groups(tmp_path / "whole.gz", groups, 2, str)

    first, _ = gzip.decompress((tmp_path / "whole.gz").read_bytes()).decode().splitlines()
    (tmp_path / "step_00000001.jsonl").write_text(f"{first}\n{{oops\n")

    def error(context: Context) -> str:
        with pytest.raises(DataError) as caught:
            replaying(context, tmp_path)
        return str(caught.value)

    said = World(2).run(error)
    assert said[0] == said[1] and "rollout.replay: " in said[0] and "step_00000001.jsonl:2: broken line" in said[0]


def test_a_step_without_files_is_an_error_and_not_an_empty_step(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rollouts of step 1"):
        replaying(Context(World(1), 0), tmp_path)


def of_versions(*versions: int) -> Sample:
    found = np.array(versions, dtype=np.int32)
    return Sample(Completion(found, -np.ones(len(found), np.float32), "stop", found), "", 1.0)


def test_versions_and_metrics_are_those_of_the_tokens() -> None:
    made = group([of_versions(3, 3), of_versions(3, 4, 4)], privileged=[of_versions(4)])
    check_versions([outline_of(made)], version=4, ahead=1)
    with pytest.raises(TrainingError, match=r"version \[3\], not 4"):
        check_versions([outline_of(made)], version=4)
    plain = [sample(1.0, length=4), sample(0.0, length=2, cut=True)]
    metrics = rollout_metrics([outline_of(made), outline_of(group(plain))])
    every = np.concatenate([s.completion.logprobs for s in (*made.samples, *plain)])
    assert metrics["rollout/nll"] == pytest.approx(-every.mean(), rel=1e-6)
    assert metrics["rollout/mixed_versions_rate"] == 0.25 and metrics["rollout/truncated_rate"] == 0.25
    assert metrics["rollout/response_tokens"] == 11 / 4
