"""The limit on the mismatch of engine and trainer."""

from __future__ import annotations

import math

import pytest

from megatron_hdpo.model.policy import TrainingError
from megatron_hdpo.training.mismatch import MISMATCH, check_mismatch


@pytest.mark.parametrize("found", [0.51, math.inf, math.nan])
@pytest.mark.fault(
    "engine and trainer disagree on log-probs",
    phase="learning",
    seen="`train/mismatch_k3 is ...`, exit code 2; the step is not saved",
    lost="that step",
)
def test_a_step_beyond_the_limit_stops_the_run(found: float) -> None:
    with pytest.raises(
        TrainingError, match=rf"step 7: train/mismatch_k3 is {found:.3g}, and train.max_mismatch_k3 is 0.5"
    ):
        check_mismatch({MISMATCH: found}, 0.5, 7)
    check_mismatch({MISMATCH: found}, None, 7)


def test_a_step_within_the_limit_or_without_a_surrogate_goes_on() -> None:
    check_mismatch({MISMATCH: 0.5}, 0.5, 7)
    check_mismatch({"train/tokens": 0.0}, 0.5, 7)
