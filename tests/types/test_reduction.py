"""Metrics are reduced by what they carry, whatever their names."""

import json
import pickle

import pytest

from megatron_hdpo.types.metrics import Metric, reduce_metrics


def test_values_are_reduced_as_they_say():
    parts = [
        {"a_max": 1.0, "tokens": Metric(3.0, "sum"), "worst": Metric(1.0, "max"), "least": Metric(2, "min")},
        {"a_max": 4.0, "tokens": Metric(4.0, "sum"), "worst": Metric(5.0, "max"), "later": 2.0},
        {"worst": Metric(2.0, "max"), "least": Metric(1, "min")},
    ]
    assert reduce_metrics(parts) == {"a_max": 2.5, "tokens": 7.0, "worst": 5.0, "least": 1.0, "later": 2.0}
    assert reduce_metrics([]) == {}


@pytest.mark.parametrize("reduction", ["sum", "max", "min"])
def test_a_metric_is_a_number_that_travels_between_ranks(reduction):
    metric = pickle.loads(pickle.dumps({"n": Metric(2.5, reduction)}))["n"]
    assert metric == 2.5 and metric.reduction == reduction
    assert json.dumps(metric) == "2.5" and type(reduce_metrics([{"n": metric}])["n"]) is float
