"""Faults that strike a real run at chosen steps, and what each of its lives holds open."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

STRUCK = "struck.txt"
USAGE = "usage.jsonl"


@dataclass(frozen=True)
class Fault:
    """A fault amid a step (from 1), on one rank. kind: one of IN_THE_PROCESS, or of BETWEEN_LIVES after a kill."""

    kind: str
    step: int
    rank: int = 0


def plan(seed: int, steps: int, faults: int, ranks: int) -> list[Fault]:
    """So many faults at different steps, drawn by the seed; no kind comes again before every other has come."""
    rng = random.Random(f"soak/{seed}")
    kinds: list[str] = []
    while len(kinds) < faults:
        every = [*IN_THE_PROCESS, *BETWEEN_LIVES]
        rng.shuffle(every)
        kinds += every
    # Not the last two: a checkpoint that found no room, and one that was damaged, need a later one.
    at = sorted(rng.sample(range(2, steps - 1), faults))
    return [Fault(kind, step, rng.randrange(ranks)) for kind, step in zip(kinds, at, strict=False)]


def live(recipe: str, faults: Sequence[Fault], notes: str) -> None:
    """`train`, struck by the faults that no earlier life has met. notes: folder of what is noted between lives."""
    from megatron_hdpo.cli import main

    rank, folder = int(os.environ["RANK"]), Path(notes)
    _note_usage(folder / USAGE, rank)
    met = (folder / STRUCK).read_text().splitlines() if (folder / STRUCK).exists() else []
    for fault in faults:
        if fault.rank == rank and _name(fault) not in met:
            install = IN_THE_PROCESS.get(fault.kind, _kill_while_it_learns)
            install(fault.step, lambda fault=fault: _note(folder / STRUCK, _name(fault)))
    main(["train", recipe])


def after(fault: Fault, output: Path) -> None:
    """Do what happens to the folder of a run after its process was killed by a fault of BETWEEN_LIVES."""
    BETWEEN_LIVES.get(fault.kind, lambda folder: None)(output)


def struck(faults: Sequence[Fault], notes: Path) -> list[Fault]:
    """Return the faults that have struck, in their order."""
    lines = (notes / STRUCK).read_text().splitlines() if (notes / STRUCK).exists() else []
    named = {_name(fault): fault for fault in faults}
    return [named[line] for line in lines]


def _name(fault: Fault) -> str:
    return json.dumps(asdict(fault))


def _note(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def _note_usage(path: Path, rank: int) -> None:
    """Note after each step what this process and its children hold."""
    from megatron_hdpo.training.learner import Learner

    original, own = Learner.learn, psutil.Process()

    def learn(self: Any, rollouts: Any, step: int) -> Any:
        metrics = original(self, rollouts, step)
        children = own.children(recursive=True)
        held = {
            "rank": rank,
            "pid": own.pid,
            "step": step + 1,
            "bytes": own.memory_info().rss,
            "descriptors": own.num_fds(),
            "threads": own.num_threads(),
            "children": [child.pid for child in children],
        }
        _note(path, json.dumps(held))
        return metrics

    Learner.learn = learn  # type: ignore[method-assign]


def _before_learning(step: int, do: Callable[[], None]) -> None:
    from megatron_hdpo.training.learner import Learner

    original = Learner.learn

    def learn(self: Any, rollouts: Any, now: int) -> Any:
        if now == step - 1:
            do()
        return original(self, rollouts, now)

    Learner.learn = learn  # type: ignore[method-assign]


def _before_sampling(step: int, do: Callable[[], None]) -> None:
    from megatron_hdpo.sampling.coordinator import RolloutCoordinator

    original = RolloutCoordinator.sample_step

    def sample_step(self: Any, problems: Any, now: int, *args: Any, **options: Any) -> Any:
        if now == step - 1:
            do()
        return original(self, problems, now, *args, **options)

    RolloutCoordinator.sample_step = sample_step  # type: ignore[method-assign]


def _signal(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def _kill_while_it_samples(step: int, note: Callable[[], None]) -> None:
    _before_sampling(step, lambda: (note(), _signal(signal.SIGKILL)))


def _kill_while_it_learns(step: int, note: Callable[[], None]) -> None:
    _before_learning(step, lambda: (note(), _signal(signal.SIGKILL)))


def _ask_while_it_samples(step: int, note: Callable[[], None]) -> None:
    _before_sampling(step, lambda: (note(), _signal(signal.SIGUSR1)))


def _ask_while_it_learns(step: int, note: Callable[[], None]) -> None:
    _before_learning(step, lambda: (note(), _signal(signal.SIGTERM)))


def _kill_after_the_metrics(step: int, note: Callable[[], None]) -> None:
    """When the line of a step is written, and before its checkpoint is."""
    from megatron_hdpo.training.record import RunRecord

    original = RunRecord.log

    def log(self: Any, now: int, metrics: Any) -> None:
        original(self, now, metrics)
        if now == step:
            note()
            _signal(signal.SIGKILL)

    RunRecord.log = log  # type: ignore[method-assign]


def _kill_amid_a_checkpoint(step: int, note: Callable[[], None]) -> None:
    """When the files of the first checkpoint from this step on are written, but it has not got its name."""
    from megatron.core import dist_checkpointing

    original = dist_checkpointing.save

    def save(sharded: Any, path: str, **options: Any) -> Any:
        request = original(sharded, path, **options)
        name = Path(path).name.partition(".")[0]
        if name.startswith("step_") and int(name.removeprefix("step_")) >= step:
            request.add_finalize_fn(lambda: (note(), _signal(signal.SIGKILL)))
        return request

    dist_checkpointing.save = save


def _kill_checking_processes(step: int, note: Callable[[], None]) -> None:
    """They are grandchildren: a fork server stands between."""

    def kill() -> None:
        note()
        for child in psutil.Process().children():
            for worker in child.children():
                worker.kill()

    _before_learning(step, kill)


def _fill_the_disk(step: int, note: Callable[[], None]) -> None:
    """The first checkpoint from this step on finds no room."""
    from megatron_hdpo.checkpoint import room
    from megatron_hdpo.checkpoint.store import CheckpointStore

    save, free = CheckpointStore.save, room.free_bytes
    full: list[bool] = []

    def saved(self: Any, now: int, *args: Any) -> Any:
        if now >= step and not full:
            note()
            full.append(True)
            room.free_bytes = lambda folder: 1000
        try:
            return save(self, now, *args)
        finally:
            room.free_bytes = free

    CheckpointStore.save = saved  # type: ignore[method-assign]


def _flip_a_bit(output: Path) -> None:
    """Of the largest file of the newest checkpoint, if an older one is left."""
    checkpoints = sorted((output / "checkpoints").glob("step_????????"))
    if len(checkpoints) > 1:
        largest = max(checkpoints[-1].iterdir(), key=lambda path: path.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)


def _cut_the_metrics(output: Path) -> None:
    """As a power cut leaves them: half of a line at the end."""
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')


def _leave_half_a_checkpoint(output: Path) -> None:
    """As a removal leaves it that was cut off, and a save."""
    newest = sorted((output / "checkpoints").glob("step_????????"))[-1:]
    for checkpoint in newest:
        half = checkpoint.with_name("step_00009999.partial")
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(checkpoint, half)
        (half / "run_state.json").unlink()


IN_THE_PROCESS: dict[str, Callable[[int, Callable[[], None]], None]] = {
    "killed while it samples": _kill_while_it_samples,
    "killed while it learns": _kill_while_it_learns,
    "killed after the metrics": _kill_after_the_metrics,
    "killed amid a checkpoint": _kill_amid_a_checkpoint,
    "asked to end while it samples": _ask_while_it_samples,
    "asked to end while it learns": _ask_while_it_learns,
    "checking processes killed": _kill_checking_processes,
    "no room for a checkpoint": _fill_the_disk,
}
BETWEEN_LIVES: dict[str, Callable[[Path], None]] = {
    "newest checkpoint damaged": _flip_a_bit,
    "metrics cut": _cut_the_metrics,
    "half a checkpoint left": _leave_half_a_checkpoint,
}
