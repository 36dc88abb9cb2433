"""Samples that wait for a slot: the oldest first, and each at the server that has its prompt in its cache."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass, field

from megatron_hdpo.rollout.sglang.replica import Replica


@dataclass(eq=False)
class Prompt:
    """A prompt with unfinished samples.

    samples: how many wait or run. home: server that has the prompt in its cache, None before the first sample runs.
    waiting: those that wait, the oldest first.
    """

    samples: int = 0
    home: Replica | None = None
    waiting: dict[WaitingSample, None] = field(default_factory=dict)


@dataclass(eq=False)
class WaitingSample:
    """A sample that waits for a slot.

    spread: samples that the home of its prompt may hold more than the idlest server. avoid: indices of servers that
    failed it.
    """

    prompt: Prompt
    spread: int
    avoid: Collection[int]
    slot: asyncio.Future[Replica] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class WaitingSamples:
    """Samples that wait, by what they wait for.

    A sample is loose until another one of its prompt has got a slot; then it waits for that server, its home, and no
    other server takes it while there are loose ones. Adding, removing and finding a sample takes the same time for any
    number of samples and servers, except of samples that avoid a server.
    """

    def __init__(self) -> None:
        self._all: dict[WaitingSample, None] = {}
        self._loose: dict[WaitingSample, None] = {}
        self._at_home: defaultdict[int, dict[WaitingSample, None]] = defaultdict(dict)

    def __len__(self) -> int:
        return len(self._all)

    def add(self, sample: WaitingSample) -> None:
        """Add a sample behind all others."""
        self._all[sample] = sample.prompt.waiting[sample] = self._group(sample)[sample] = None

    def discard(self, sample: WaitingSample) -> None:
        """Remove a sample if it waits."""
        if sample in self._all:
            del self._all[sample], sample.prompt.waiting[sample], self._group(sample)[sample]

    def settle(self, prompt: Prompt, home: Replica | None) -> None:
        """Let the samples of a prompt wait for another home, or for none."""
        if prompt.home is home:
            return
        for sample in prompt.waiting:
            del self._group(sample)[sample]
        prompt.home = home
        for sample in prompt.waiting:
            self._group(sample)[sample] = None

    def leave_homes(self, well: Container[int]) -> None:
        """Let no sample wait for a server that is not among the indices of those that are well."""
        for index, samples in self._at_home.items():
            if samples and index not in well:
                for prompt in {sample.prompt: None for sample in samples}:
                    self.settle(prompt, None)

    def next_for(self, replica: Replica, accepts: Callable[[WaitingSample], bool]) -> WaitingSample | None:
        """Return the sample that should get a slot of a server; None when there is none that accepts it.

        Samples at home come first, then loose ones, then those of other homes: no slot stays free.
        """
        for samples in (self._at_home[replica.index], self._loose, self._all):
            for sample in samples:
                if accepts(sample):
                    return sample
        return None

    def fail_all(self, error: Exception) -> None:
        """End the wait of every sample with an error."""
        for sample in list(self._all):
            self.discard(sample)
            if not sample.slot.done():
                sample.slot.set_exception(error)

    def _group(self, sample: WaitingSample) -> dict[WaitingSample, None]:
        home = sample.prompt.home
        return self._loose if home is None or home.index in sample.avoid else self._at_home[home.index]
