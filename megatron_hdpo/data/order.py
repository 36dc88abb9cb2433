"""The order of training problems: a pure function of problems, weights, seed and step, so resuming needs only the step.

It orders the whole batch and ranks take shares of the batch, so the number of ranks does not change it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence

from megatron_hdpo.types.errors import DataError
from megatron_hdpo.types.problem import Problem


class ProblemOrder:
    """Batches of problems. Each task runs through epochs, shuffled for each, every problem once per epoch.

    weights: share of each task in a batch; a task without a weight counts by its number of problems, so that without
    any weight all problems are seen equally often. No problem is twice in a batch while its task has enough of them,
    also where a batch spans two epochs.
    """

    def __init__(self, problems: Sequence[Problem], weights: Mapping[str, float] | None = None, seed: int = 0) -> None:
        if not problems:
            raise DataError("no problems to order")
        self.seed = seed
        self._by_task: dict[str, list[Problem]] = {}
        for problem in problems:
            self._by_task.setdefault(problem.task, []).append(problem)
        self._shares = self._normalised(weights or {})
        self._epochs: dict[tuple[str, int], dict[int, list[int]]] = {}
        self._counts: dict[tuple[int, int], dict[str, int]] = {}

    def batch(self, step: int, size: int) -> list[Problem]:
        """Return the `size` problems of a step (counted from 0), tasks mixed.

        All earlier steps are assumed to have had the same size. Raises ValueError for a negative step or a size below
        1.
        """
        if step < 0 or size < 1:
            raise ValueError(f"step must be 0 or more and size 1 or more, not {step} and {size}")
        start, end = self._drawn(step, size), self._drawn(step + 1, size)
        chosen = [p for task in self._by_task for p in self._slice(task, start[task], end[task], size)]
        random.Random(f"{self.seed}/batch/{step}").shuffle(chosen)
        return chosen

    def check_size(self, size: int) -> None:
        """Raise DataError when a batch of `size` would hold a problem twice, as a task has fewer than its share."""
        for task, share in self._shares.items():
            if share * size > (known := len(self._by_task[task])) and not math.isclose(share * size, known):
                raise DataError(
                    f"task {task!r}: a step takes {share * size:.4g} of its {known} problems, and copies of a problem "
                    f"would be sampled alike: lower rollout.prompts_per_step ({size}), or give it more problems or a "
                    "smaller weight"
                )

    def further(self, step: int, turn: int, size: int, leave_out: Collection[str]) -> list[Problem]:
        """Return up to `size` more problems, without those of the ids in `leave_out`, tasks by their shares.

        A function of seed, step and turn. These problems do not count in the epochs.
        """
        rng = random.Random(f"{self.seed}/further/{step}/{turn}")
        seen = set(leave_out)
        left = {task: [p for p in problems if p.id not in seen] for task, problems in self._by_task.items()}
        chosen: list[Problem] = []
        while len(chosen) < size and (tasks := [task for task in left if left[task]]):
            (task,) = rng.choices(tasks, [self._shares[task] for task in tasks])
            chosen.append(left[task].pop(rng.randrange(len(left[task]))))
        return chosen

    def _normalised(self, weights: Mapping[str, float]) -> dict[str, float]:
        if unknown := weights.keys() - self._by_task.keys():
            raise DataError(f"weights name tasks without problems: {', '.join(sorted(unknown))}")
        raw = {task: float(weights.get(task, len(problems))) for task, problems in self._by_task.items()}
        if min(raw.values()) <= 0:
            raise DataError(f"weights must be positive: {raw}")
        total = sum(raw.values())
        return {task: weight / total for task, weight in raw.items()}

    def _drawn(self, step: int, size: int) -> dict[str, int]:
        """Return the number of problems drawn of each task before `step`.

        Each step tops up the tasks that are furthest behind their share.
        """
        if (step, size) in self._counts:
            return self._counts[step, size]
        known = max((s for s, z in self._counts if z == size and s < step), default=0)
        drawn = dict(self._counts.get((known, size), dict.fromkeys(self._by_task, 0)))
        for earlier in range(known, step):
            drawn = self._topped_up(drawn, (earlier + 1) * size)
        self._counts = {key: value for key, value in self._counts.items() if key[0] >= step - 1} | {(step, size): drawn}
        return drawn

    def _topped_up(self, drawn: Mapping[str, int], total: int) -> dict[str, int]:
        behind = {task: max(0.0, share * total - drawn[task]) for task, share in self._shares.items()}
        new = {task: drawn[task] + math.floor(amount) for task, amount in behind.items()}
        by_need = sorted(behind, key=lambda task: behind[task] % 1, reverse=True)
        while (missing := total - sum(new.values())) > 0:
            for task in by_need[:missing]:
                new[task] += 1
        while sum(new.values()) > total:
            new[next(task for task in reversed(by_need) if new[task] > drawn[task])] -= 1
        return new

    def _slice(self, task: str, start: int, end: int, size: int) -> list[Problem]:
        problems = self._by_task[task]
        spacing = min(len(problems), math.ceil(self._shares[task] * size) + len(self._shares))
        places = [divmod(position, len(problems)) for position in range(start, end)]
        return [problems[self._epoch(task, epoch, spacing)[place]] for epoch, place in places]

    def _epoch(self, task: str, epoch: int, spacing: int) -> list[int]:
        """Return the permutation of an epoch; no problem repeats within `spacing` draws of the previous epoch."""
        key = (task, spacing)
        known = self._epochs.setdefault(key, {})
        if epoch not in known:
            first = max((e for e in known if e < epoch), default=-1)
            order = known.get(first, [])
            for later in range(first + 1, epoch + 1):
                rng = random.Random(f"{self.seed}/{task}/{later}")
                order = spaced_shuffle(len(self._by_task[task]), order, spacing, rng)
            self._epochs[key] = known = {e: o for e, o in known.items() if e == epoch - 1} | {epoch: order}
        return known[epoch]


def spaced_shuffle(count: int, previous: Sequence[int], spacing: int, rng: random.Random) -> list[int]:
    """Return a random permutation of range(count) that repeats nothing soon after `previous`.

    Any `spacing` consecutive draws across `previous` and the result are different: the item at index i of `previous`
    may come back from index spacing - (count - i) on. Without `previous`, any order.
    """
    if not previous:
        order = list(range(count))
        rng.shuffle(order)
        return order
    free = count - spacing + 1
    available, order = list(previous[:free]), []
    for place in range(count):
        pick = rng.randrange(len(available))
        available[pick], available[-1] = available[-1], available[pick]
        order.append(available.pop())
        if free + place < count:
            available.append(previous[free + place])
    return order
