"""Which ranks keep the others waiting, judged by what each rank last said of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

BEAT_S, LOOK_S = 10.0, 30.0
"""Longest time between two beats of a rank, and between two looks of a waiting rank at those of the others."""
KEYS_PER_S = 16
"""Beats that one waiting rank reads per second at most: the looks of a thousand ranks must not load the store."""
SAY_S = 300.0
"""Seconds after which, and between which, a waiting rank reports for whom it waits."""
MEETING, COLLECTIVE = "meeting", "collective"
_SAME_TIME = 0.8
"""Share of its deadline after which a rank is named beside one that is over it: several stand still at once."""
_MOST_NAMED = 3


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    count: of its beats. arrived: meetings at which it has arrived. waits: MEETING or COLLECTIVE while it waits there,
    "" while it works. phase: of the run, such as "train". doing: phase and progress, for people. at: line of code.
    still_s: seconds since anything of this has changed, but for `at`. collectives: calls per process group, by name.
    left: the rank ends in peace.
    """

    host: str
    count: int = 0
    arrived: int = 0
    waits: str = ""
    phase: str = ""
    doing: str = ""
    at: str = ""
    still_s: float = 0.0
    collectives: Mapping[str, int] = field(default_factory=dict)
    left: bool = False


@dataclass(frozen=True)
class Patience:
    """Seconds that ranks wait for one that shows no progress, and for one without beats (`process_s`).

    work_s: of ranks at a meeting. collective_s: of ranks in a collective; default: `work_s`. phases: instead of both,
    by the phase of the late rank. say_s: between two reports on ranks that others wait for.
    """

    work_s: float
    process_s: float
    say_s: float = SAY_S
    collective_s: float | None = None
    phases: Mapping[str, float] = field(default_factory=dict)

    @property
    def beat_s(self) -> float:
        """Return the seconds between two beats: many of them fit into a deadline."""
        return min(BEAT_S, self._shortest_s / 20)

    def look_s(self, ranks: int) -> float:
        """Return the seconds between two looks at the beats of so many ranks."""
        return max(min(LOOK_S, self._shortest_s / 10), ranks / KEYS_PER_S)

    def deadline_s(self, phase: str, waits: str) -> float:
        """Return the seconds for which ranks that wait in this way bear with one that stands still in `phase`."""
        of_all = self.work_s if waits == MEETING or self.collective_s is None else self.collective_s
        return self.phases.get(phase, of_all)

    def key(self, phase: str, waits: str) -> str:
        """Return the recipe's key of that deadline."""
        if phase in self.phases:
            return f"parallel.phase_minutes.{phase}"
        return "parallel.silence_minutes" if waits == MEETING else "parallel.timeout_minutes"

    @property
    def last_resort_s(self) -> float:
        """Return the seconds after which a collective fails by itself: later than any verdict."""
        return 1.1 * max(self._all_s) + 60.0

    @property
    def _shortest_s(self) -> float:
        return min(self._all_s)

    @property
    def _all_s(self) -> list[float]:
        collective_s = self.work_s if self.collective_s is None else self.collective_s
        return [self.work_s, collective_s, self.process_s, *self.phases.values()]


def verdict(beats: Sequence[Beat], silent_s: Sequence[float], patience: Patience) -> str:
    """Return which ranks are given up, and why, in one line; "" while all may still come.

    beats: the last of each rank. silent_s: how long there has been no other one of that rank.

    A rank is late when it stands still for longer than its deadline, waits for nobody, and others have waited as long.
    """
    present = [rank for rank, beat in enumerate(beats) if not beat.left]
    silent = {
        rank: f"has given no sign of life for {_duration(silent_s[rank])} (parallel.timeout_minutes)"
        for rank in present
        if silent_s[rank] > patience.process_s
    }
    alive = [rank for rank in present if rank not in silent]
    late = silent or _without_progress(beats, alive, patience)
    if late:
        named = [f"{_name(rank, beats[rank])} {why}; {last_words(rank, beats[rank])}" for rank, why in late.items()]
        # The last beat of a process that stands still may be older than the phase that it stopped in.
        at = f"; rank {alive[0]} is at: {_doing(beats[alive[0]])}" if silent and alive else ""
        return "; also ".join(named[:_MOST_NAMED]) + _and_more(named) + at
    return _deadlock(beats, alive, patience) if alive else ""


def _without_progress(beats: Sequence[Beat], alive: Sequence[int], patience: Patience) -> dict[int, str]:
    """Return the ranks that keep others waiting, each with what is wrong."""
    working = [rank for rank in alive if not beats[rank].waits]
    # On NCCL all ranks seem to work. One that has called more collectives than another waits for that one.
    working = [rank for rank in working if not _calls_more(rank, beats, alive)] or working
    waiting = [rank for rank in alive if rank not in working]
    for share in (1.0, _SAME_TIME):
        found = {rank: _overdue(rank, beats, waiting, patience, share) for rank in working}
        if not any(found.values()):
            return {}
    return {rank: why for rank, why in found.items() if why}


def _overdue(rank: int, beats: Sequence[Beat], waiting: Sequence[int], patience: Patience, share: float) -> str:
    """Return what is wrong with a rank that stands still while others wait; "" while that may go on."""
    beat = beats[rank]
    for other in waiting:
        waits = beats[other].waits or COLLECTIVE
        if waits == MEETING and beats[other].arrived <= beat.arrived:
            continue
        deadline_s = patience.deadline_s(beat.phase, waits) * share
        if min(beat.still_s, beats[other].still_s) > deadline_s:
            key = patience.key(beat.phase, waits)
            return (
                f"has made no progress for {_duration(beat.still_s)} while {_name(other, beats[other])} waited for it "
                f"in '{beats[other].phase}' (raise {key} if its work may take longer without any)"
            )
    return ""


def _deadlock(beats: Sequence[Beat], alive: Sequence[int], patience: Patience) -> str:
    """Return that all ranks wait for each other: in different collectives, or for a network that hangs."""
    for rank in alive:
        beat = beats[rank]
        longest_s = max(patience.deadline_s(beat.phase, waits) for waits in (MEETING, COLLECTIVE))
        if not beat.waits or beat.still_s <= longest_s:
            return ""
    behind = [rank for rank in alive if any(_calls_more(other, beats, [rank]) for other in alive)]
    named = [f"{_name(rank, beats[rank])} ({_doing(beats[rank])})" for rank in behind or alive]
    fewer = " called fewer collectives than others" if behind else ""
    still_s = min(beats[rank].still_s for rank in alive)
    return (
        f"all ranks wait for each other, without progress for {_duration(still_s)}: "
        f"{'; '.join(named[:_MOST_NAMED])}{_and_more(named)}{fewer}"
    )


def _calls_more(rank: int, beats: Sequence[Beat], others: Sequence[int]) -> bool:
    """Return whether a rank has called more collectives than one of `others` that is in the same process group."""
    return any(
        calls > beats[other].collectives.get(group, calls)
        for group, calls in beats[rank].collectives.items()
        for other in others
    )


def last_words(rank: int, beat: Beat) -> str:
    """Return what a rank last said of itself, and where the rest can be read."""
    return f"the last that it said: {_doing(beat)}; see logs/rank_{rank:05d}.log in the run folder"


def _doing(beat: Beat) -> str:
    return ", at ".join(text for text in (beat.doing or "nothing", beat.at) if text)


def _name(rank: int, beat: Beat) -> str:
    return f"rank {rank} on {beat.host}"


def _and_more(named: Sequence[str]) -> str:
    return f", and {len(named) - _MOST_NAMED} more ranks" if len(named) > _MOST_NAMED else ""


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
