"""The table with one row per training step; its columns are those that the objective names and the width allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_hdpo.tracking.formats import clock, fitted
from megatron_hdpo.tracking.names import STEP_SECONDS, step_seconds
from megatron_hdpo.types.headline import (
    GRADIENT_NORM,
    LEARNING_RATE,
    RESPONSE_LENGTH,
    REWARD,
    TRUNCATED,
    WIDEST_HEADING,
    Headline,
)

_COLUMN = WIDEST_HEADING + 1
_ELAPSED_FROM = 120
_SPEED = Headline("perf/step_tokens_per_s_per_gpu", "tok/s", "Tokens per second and rank, over the whole step", ",.0f")
_SECONDS = Headline(STEP_SECONDS, "seconds", "Wall seconds of the step", ".1f")
_AT_THE_END = (RESPONSE_LENGTH, _SPEED, _SECONDS)
_IF_THERE_IS_SPACE = (GRADIENT_NORM, TRUNCATED, LEARNING_RATE)


class StepTable:
    """Header and rows of the steps of a run.

    headlines: of the objective, the most important first. total: steps of the run. width: characters of a row at most,
    80 at least.
    """

    def __init__(self, headlines: Sequence[Headline], total: int, width: int) -> None:
        self._total = total
        self._step_width = max(4, 2 * len(str(total)) + 1)
        self._shows_elapsed = width >= _ELAPSED_FROM
        times = _COLUMN * (1 + self._shows_elapsed)
        self.columns = _chosen(headlines, (width - self._step_width - times) // _COLUMN)

    @property
    def header(self) -> str:
        """Return the headings of the columns."""
        times = ["elapsed", "left"] if self._shows_elapsed else ["left"]
        return self._line("step", [column.short for column in self.columns] + times)

    @property
    def legend(self) -> str:
        """Return what the columns mean, in one line."""
        meanings = [f"{column.short} = {column.label[0].lower()}{column.label[1:]}" for column in self.columns]
        return f"columns: {'; '.join(meanings)}; left = estimate for the rest of the run; - = not measured"

    def row(self, step: int, metrics: Mapping[str, float | None], elapsed_s: float, left_s: float | None) -> str:
        """Return the row of a step. left_s: None where it cannot be estimated yet."""
        values = {**metrics, STEP_SECONDS: step_seconds(metrics)}
        cells = [fitted(values.get(column.name), column.spec, WIDEST_HEADING) for column in self.columns]
        times = ["-" if left_s is None else clock(left_s)]
        if self._shows_elapsed:
            times.insert(0, clock(elapsed_s))
        return self._line(f"{step}/{self._total}", cells + times)

    def _line(self, first: str, cells: Sequence[str]) -> str:
        return first.rjust(self._step_width) + "".join(cell.rjust(_COLUMN) for cell in cells)


def _chosen(headlines: Sequence[Headline], count: int) -> list[Headline]:
    """Return `count` columns at most: the reward, as many of the objective's as fit, and what every run has."""
    own = [headline for headline in headlines if headline not in (REWARD, *_AT_THE_END)]
    own += [headline for headline in _IF_THERE_IS_SPACE if headline not in own]
    return [REWARD, *own[: max(0, count - 1 - len(_AT_THE_END))], *_AT_THE_END]
