"""Does HDPO teach what GRPO cannot reach? Two seeds, with controls that move the model without teaching it.
MEGATRON_HDPO_LEARNING_SEEDS="0 1 2" runs others.

A model of half a million parameters is warmed up on sums of 2 to 4 digits, and on copying the running totals of up to
8 digits when they are shown. Sums of 6, 7 and 8 digits are then cliffs. From the same weights: GRPO alone (lambda 0);
HDPO; HDPO with targets shuffled between positions; HDPO whose teacher is shown the solution of another problem.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from learning import check_lift, learn_all, scores_of

CONTROLS = ("grpo", "shuffled_targets", "wrong_reference")


@pytest.mark.slow
def test_hdpo_lifts_what_grpo_and_the_controls_leave_low(warmed_up: Path, tmp_path: Path) -> None:
    check_lift(scores_of(learn_all(warmed_up, tmp_path, ("hdpo", *CONTROLS))), CONTROLS)
