"""Background writing of rollouts: each rank saves the groups that it holds, while the ranks train on."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_hdpo.sampling.saved import Decode, all_files, step_file, step_files, step_of, write_groups
from megatron_hdpo.sampling.step_rollouts import StepRollouts

MOST_WAITING = 2
"""Steps that may wait for the disk; with more, `save` waits."""

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class NotSaved:
    """Number of groups that could not be written, and why the first of them could not."""

    groups: int = 0
    reason: str = ""


class RolloutSaver:
    """Writes the groups that this rank holds, one compressed file per step, in a thread.

    No group is lost without a word: a step that finds MOST_WAITING others in front of it waits, and what cannot be
    written is counted. keep: number of steps whose files stay in the folder, None for all of them; rank 0 removes the
    others.
    """

    def __init__(self, folder: Path, rank: int, decode: Decode, keep: int | None = None) -> None:
        self.folder, self.rank, self.decode, self.keep = folder, rank, decode, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save-rollouts")
        self._waiting: deque[Future[None]] = deque()
        self._not_saved, self._lock = NotSaved(), threading.Lock()

    def save(self, step: int, rollouts: StepRollouts) -> None:
        """Begin to write the groups of a step, counted from 1, over those of an earlier try of it."""
        while len(self._waiting) >= MOST_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(partial(self._save, step, rollouts)))

    def take_not_saved(self) -> NotSaved:
        """Return what could not be written since the last call."""
        with self._lock:
            taken, self._not_saved = self._not_saved, NotSaved()
        return taken

    def flush(self) -> None:
        """Wait until everything is written or counted."""
        while self._waiting:
            self._waiting.popleft().result()

    def close(self) -> None:
        """Write what is waiting, and end the thread."""
        self._thread.shutdown()

    def _save(self, step: int, rollouts: StepRollouts) -> None:
        try:
            if self.rank == 0:
                self._remove(step, {holder or 0 for holder in rollouts.holders})
            if rollouts.held:
                write_groups(self.folder / step_file(step, self.rank), rollouts.held, len(rollouts), self.decode)
        except (OSError, ValueError) as error:
            LOGGER.warning("the rollouts of step %d are not saved: %s", step, error)
            with self._lock:
                known = self._not_saved
                self._not_saved = NotSaved(known.groups + len(rollouts.held), known.reason or f"step {step}: {error}")

    def _remove(self, step: int, holders: Collection[int]) -> None:
        """Remove the step's files that nobody will write again, and the steps that are not kept."""
        stays = {step_file(step, rank) for rank in holders}
        gone = [path for path in step_files(self.folder, step) if path.name not in stays]
        if self.keep is not None:
            gone += [path for path in all_files(self.folder) if step_of(path) <= step - self.keep]
        for path in gone:
            path.unlink(missing_ok=True)
