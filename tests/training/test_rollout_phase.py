"""The rollout phase on several ranks: rollouts that no disk took, and saved ones that cannot be read."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rollout_groups import group, sample
from thread_ranks import Context, World

from megatron_hdpo.model.policy import TrainingError
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.grpo import GRPO, GRPOConfig
from megatron_hdpo.sampling.saved import step_file, write_groups
from megatron_hdpo.sampling.saver import NotSaved
from megatron_hdpo.sampling.step_rollouts import on_every_rank
from megatron_hdpo.training.rollout_phase import (
    _replayed,
    _sampled,
    begin_next_rollouts,
    check_versions,
    flush_saved_rollouts,
    rollout_metrics,
    staleness_metrics,
)
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
    architecture = SimpleNamespace(num_layers=2, experts_per_token=2, vocab_size=1_000_000)
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


def test_staleness_is_that_of_the_students_tokens() -> None:
    made = [group([of_versions(3, 3), of_versions(3, 4, 4, 5)], privileged=[of_versions(1)]), group([of_versions(5)])]
    outlines = list(map(outline_of, made))
    assert staleness_metrics(outlines, 5) == {"rollout/staleness_mean": (4 + 4) / 7, "rollout/staleness_max": 2.0}
    assert staleness_metrics([outline_of(group([]))], 5) == {}
    check_versions(outlines, 4 + 1, ahead=4)
    with pytest.raises(TrainingError, match=r"version \[1\], not 2 to 5"):
        check_versions(outlines, 5, ahead=3)


@pytest.mark.parametrize(
    ("step", "ahead", "begun"),
    [(0, 0, []), (0, 1, [1]), (0, 3, [1, 2, 3]), (6, 3, [7, 8, 9]), (8, 3, [9]), (9, 3, [])],
)
def test_as_many_steps_are_begun_as_may_be_ahead_and_no_more_than_there_are(
    step: int, ahead: int, begun: list[int]
) -> None:
    made_room, asked = [], []
    prefetched = SimpleNamespace(begin=lambda step, objective: asked.append(step))
    run: Any = SimpleNamespace(
        recipe=SimpleNamespace(rollout=SimpleNamespace(replay=None, ahead=ahead), train=SimpleNamespace(steps=10)),
        step=step,
        objective=None,
        prefetched=prefetched,
        engine=SimpleNamespace(make_room=lambda: made_room.append(True)),
    )
    prefetched.begun = len(begun)
    begin_next_rollouts(run)
    assert asked == begun and len(made_room) == (not begun)


def test_further_problems_are_sampled_while_the_steps_ahead_are_paused() -> None:
    """From the first round of dynamic sampling to the last, and not at all where no group is missing."""
    pauses: list[str] = []

    @contextmanager
    def paused() -> Iterator[None]:
        pauses.append("begin")
        yield
        pauses.append("end")

    def further(rewards: list[float]) -> Any:
        def step(*args: Any) -> Any:
            pauses.append("sampled")
            return on_every_rank([group(rewards, problem=f"sums/{len(pauses)}")])

        return SimpleNamespace(step=step)

    def sampled(first: list[float], second: list[float]) -> list[str]:
        pauses.clear()
        rollout = SimpleNamespace(prompts_per_step=1, refill_rounds=2)
        phase = SimpleNamespace(note=lambda text: pauses.append(text))
        run: Any = SimpleNamespace(
            recipe=SimpleNamespace(rollout=rollout),
            step=4,
            objective=GRPO(GRPOConfig(), ObjectiveDeps()),
            context=Context(World(1), 0),
            console=SimpleNamespace(phase=lambda *args, **settings: nullcontext(phase)),
            data=SimpleNamespace(order=SimpleNamespace(further=lambda *args: [])),
            coordinator=further(second),
            prefetched=SimpleNamespace(
                begun=3, ready=2, paused=paused, take=lambda *args: on_every_rank([group(first)])
            ),
            whose_samples="on rank 0",
        )
        _sampled(run)
        return list(pauses)

    text = "2 of 3 steps ready on rank 0"
    assert sampled([1, 0], [1, 0]) == [text]
    assert sampled([1, 1], [1, 0]) == [text, "begin", "sampled", "end"]
    assert sampled([1, 1], [0, 0]) == [text, "begin", "sampled", "begin", "sampled", "end", "end"]


def test_lost_privileged_rollouts_are_counted_apart_from_the_students() -> None:
    made = group([1.0, 0.0])
    made.dropped = {"generation_failed": 1, "privileged_generation_failed": 3, "privileged_check_failed": 2, "wrong": 5}
    metrics = rollout_metrics([outline_of(made), outline_of(made)])
    lost = {name.removeprefix("rollout/"): value for name, value in metrics.items() if name.endswith("_failed")}
    assert lost == {
        "generation_failed": 2,
        "check_failed": 0,
        "privileged_generation_failed": 6,
        "privileged_check_failed": 4,
    }
