"""Does HDPO teach what GRPO cannot reach? With controls that move the model without teaching it.

A tiny model is warmed up on short sums, and on copying the running totals of longer ones when they are shown. The
longer sums are then cliffs. From the same weights: GRPO alone (lambda 0); HDPO; HDPO with targets shuffled between
positions; HDPO whose teacher is shown the solution of another problem. `make test` has one seed of a small task,
`make test-long` two seeds of a larger model and sums of up to 8 digits.

The last control is part of the larger task only: where the model has little to learn but the form of a solution, the
solution of another problem shows that too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from learning import LONG, SHORT, Study, check_lift, learn_all, scores_of, warm_up_all

CONTROLS = ("grpo", "shuffled_targets")


@pytest.mark.slow
def test_hdpo_lifts_what_grpo_and_the_controls_leave_low(tmp_path: Path) -> None:
    warm_up_all(SHORT, tmp_path)
    _check(SHORT, CONTROLS, tmp_path, tmp_path)


@pytest.mark.long
def test_hdpo_lifts_longer_sums_on_every_seed(warmed_up: Path, tmp_path: Path) -> None:
    _check(LONG, (*CONTROLS, "wrong_reference"), warmed_up, tmp_path)


def _check(study: Study, controls: tuple[str, ...], warm: Path, root: Path) -> None:
    check_lift(scores_of(study, learn_all(study, warm, root, ("hdpo", *controls))), controls)
