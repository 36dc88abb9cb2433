"""HDPO's loss and its gradient in every logit, on a batch made by hand, against its equations written out in loops.

The batch: a mixed group, and a cliff with two survivors; k = 3, V = 11. The reference takes the numbers that define the
batch and nothing else from the package: arXiv 2603.23871, Eq. 5, with the Jensen-Shannon divergence of a teacher
renormalised on its top k and a full student,

    JSD = sum_S [p^/2 ln(p^/M) + q/2 ln(q/M)] + P_rest/2 ln 2,   M = (p^ + q)/2 on S,
    d JSD / d z_u = q_u/2 (ln(q_u/M_u) - s),  ln(q_u/M_u) = ln 2 outside S,  s = sum_S q ln(q/M) + P_rest ln 2.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rollout_groups import group, sample, top

from megatron_hdpo.model.loss import TokenCounts, micro_batch_loss
from megatron_hdpo.model.micro_batch import example_micro_batch, loss_inputs
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.hdpo import HDPO, HDPOConfig
from megatron_hdpo.types.learning import Score

V, K, LAMBDA, CLIP = 11, 3, 0.3, 0.2
RESPONSES = [[3, 10, 0], [4, 4], [9, 1, 2, 5]]  # of the mixed group, rewards 1, 0, 0
_STD = math.sqrt(0.5) + 1e-6  # of two others, one right; their mean is 1/2
ADVANTAGES = [1.0, -0.5 / _STD, -0.5 / _STD]
FAILURES = [[8, 8], [7, 6, 5]]  # of the cliff
SURVIVORS = [[2, 3, 4], [0, 10, 9, 1]]


def softmax(z: np.ndarray) -> list[float]:
    total = sum(math.exp(x) for x in z)
    return [math.exp(x) / total for x in z]


def jsd_and_gradient(z: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> tuple[float, list[float]]:
    q = softmax(z)
    mass = sum(math.exp(x) for x in logprobs)
    p = {int(i): math.exp(x) / mass for i, x in zip(ids, logprobs, strict=True)}
    rest = 1.0 - sum(q[u] for u in p)
    value, s = 0.5 * rest * math.log(2), rest * math.log(2)
    log_ratio = [math.log(2)] * V
    for u in p:
        mixture = (p[u] + q[u]) / 2
        log_ratio[u] = math.log(q[u] / mixture)
        value += 0.5 * p[u] * math.log(p[u] / mixture) + 0.5 * q[u] * log_ratio[u]
        s += q[u] * log_ratio[u]
    return value, [0.5 * q[u] * (log_ratio[u] - s) for u in range(V)]


def surrogate_and_gradient(z: np.ndarray, token: int, advantage: float, old: float | None) -> tuple[float, list[float]]:
    q = softmax(z)
    ratio = 1.0 if old is None else q[token] / math.exp(old)
    clipped = min(max(ratio, 1 - CLIP), 1 + CLIP)
    if -advantage * clipped > -advantage * ratio:
        return -advantage * clipped, [0.0] * V
    return -advantage * ratio, [-advantage * ratio * ((u == token) - q[u]) for u in range(V)]


def reference(logits: np.ndarray, old: list[np.ndarray] | None, tops) -> tuple[float, np.ndarray]:
    """Rows of `logits`: responses, failures, survivors, one after another."""
    tokens = sum(map(len, RESPONSES + FAILURES))  # the cliff's failures count, with advantage 0
    distilled = sum(map(len, SURVIVORS))
    loss, gradient, row = 0.0, np.zeros_like(logits), 0
    for i, response in enumerate(RESPONSES):
        for t, token in enumerate(response):
            before = None if old is None else float(old[i][t])
            value, slopes = surrogate_and_gradient(logits[row], token, ADVANTAGES[i], before)
            loss += value / tokens
            gradient[row] = np.array(slopes) / tokens
            row += 1
    row += sum(map(len, FAILURES))
    for i, survivor in enumerate(SURVIVORS):
        for t in range(len(survivor)):
            value, slopes = jsd_and_gradient(logits[row], tops[i].ids_TK[t], tops[i].logprobs_TK[t])
            loss += LAMBDA * value / distilled
            gradient[row] = LAMBDA * np.array(slopes) / distilled
            row += 1
    return loss, gradient


def batch_of_hdpo(old: list[np.ndarray] | None, tops):
    """The same batch, made by the package from groups and scores."""
    mixed = group([sample(float(i == 0), token_ids=ids) for i, ids in enumerate(RESPONSES)], prompt=5)
    cliff = group(
        [sample(0.0, token_ids=ids) for ids in FAILURES], [sample(1.0, token_ids=ids) for ids in SURVIVORS], prompt=6
    )
    config = HDPOConfig.model_validate({"name": "hdpo", "distill": {"coefficient": LAMBDA, "top_k": K}})
    objective = HDPO(config, ObjectiveDeps(updates_per_step=1 if old is None else 2))
    groups = [mixed, objective.keep_privileged(cliff)]
    scores = {}
    for scoring in objective.scorings(groups):
        n = len(scoring.response_ids)
        g, kind, s, _ = scoring.key
        own = old[s] if kind == "student" and g == 0 and old is not None else np.zeros(n, dtype=np.float32)
        scores[scoring.key] = Score(own, np.zeros(n), tops[s] if kind == "privileged" else None)
    examples = objective.examples(groups, scores)
    return examples, objective.loss


@pytest.mark.parametrize("head_chunk", [100, 4])
@pytest.mark.parametrize("moved", [False, True], ids=["first-update", "policy-has-moved"])
def test_loss_and_logit_gradients(moved: bool, head_chunk: int) -> None:
    rng = np.random.default_rng(4)
    tops = [top(len(ids), K, seed=s) for s, ids in enumerate(SURVIVORS)]
    rows = sum(map(len, RESPONSES + FAILURES + SURVIVORS))
    logits = rng.normal(0, 1.5, (rows, V))
    old = [rng.normal(-2.3, 0.7, len(ids)).astype(np.float32) for ids in RESPONSES] if moved else None
    expected_loss, expected_gradient = reference(logits, old, tops)

    examples, spec = batch_of_hdpo(old, tops)
    device = torch.device("cpu")
    normalisers = TokenCounts(sum(e.surrogate_count for e in examples), sum(e.distill_count for e in examples))
    leaf = torch.tensor(logits, requires_grad=True)
    batch, inputs = example_micro_batch(examples, device), loss_inputs(examples, device)
    head = torch.eye(V, dtype=torch.float64)  # hidden states are the logits
    groups = SimpleNamespace(tp=None)
    loss, sums = micro_batch_loss(leaf, head, batch, inputs, spec, normalisers, groups, V, head_chunk)
    loss.backward()

    assert float(loss.detach()) == pytest.approx(expected_loss, rel=1e-6)
    np.testing.assert_allclose(leaf.grad.numpy(), expected_gradient, rtol=1e-5, atol=1e-9)
    failures = slice(9, 14)
    assert not expected_gradient[failures].any() and not leaf.grad[failures].any()
    assert int(sums["distill_tokens"]) == 7


def test_the_reference_is_a_gradient() -> None:
    """Differences of the reference's own loss, so that no error in its formulae can hide."""
    rng = np.random.default_rng(5)
    tops = [top(len(ids), K, seed=s) for s, ids in enumerate(SURVIVORS)]
    rows = sum(map(len, RESPONSES + FAILURES + SURVIVORS))
    logits, old = rng.normal(0, 1.5, (rows, V)), [rng.normal(-2.3, 0.7, len(ids)) for ids in RESPONSES]
    _, gradient = reference(logits, old, tops)
    for row in range(rows):
        for u in (0, 4, 10):
            step = np.zeros_like(logits)
            step[row, u] = 1e-5
            slope = (reference(logits + step, old, tops)[0] - reference(logits - step, old, tops)[0]) / 2e-5
            assert slope == pytest.approx(gradient[row, u], abs=1e-9)
