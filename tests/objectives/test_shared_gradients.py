"""A step learned from groups that were sampled on different ranks is the step learned where every rank has them all.

Methods that read texts, feedback, tokens and privileged rollouts of a group, on layouts with replicas: the same
examples reach the same micro-batches, so gradients and metrics are equal to the bit.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from method_gradients import Found, make_models, run_cases
from test_privileged_gradients import METHODS as PRIVILEGED

NAMES = ("sdpo_moved", "srpo_moved", "rlcsd_pooled", "rlsd_contrast", "contrastive", "paced_first", "opsd_full")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    everywhere = {name: PRIVILEGED[name][0] for name in NAMES}
    dealt = {f"{name} dealt": replace(case, dealt=True) for name, case in everywhere.items()}
    return run_cases(everywhere | dealt, make_models(tmp_path_factory.mktemp("models")), ["tp2_dp2", "pp2_dp2"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["tp2_dp2", "pp2_dp2"])
def test_the_same_bits(found: Found, layout: str, name: str) -> None:
    expected, dealt = found.results[layout][name], found.results[layout][f"{name} dealt"]
    assert dealt.metrics == expected.metrics
    assert dealt.gradients.keys() == expected.gradients.keys() != set()
    for parameter, gradient in expected.gradients.items():
        np.testing.assert_array_equal(dealt.gradients[parameter], gradient, err_msg=parameter)
    assert max(np.abs(gradient).max() for gradient in expected.gradients.values()) > 0
