"""Limit on the mismatch of engine and trainer, beyond which a step teaches nothing true."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_hdpo.model.policy import TrainingError

MISMATCH = "train/mismatch_k3"


def check_mismatch(metrics: Mapping[str, float], limit: float | None, step: int) -> None:
    """Raise TrainingError when engine and trainer disagree on the probabilities of a step's tokens.

    metrics: of the step, the same on every rank; a step without a surrogate loss has no mismatch. limit: largest
    train/mismatch_k3; None: any is accepted. step: of the metrics.
    """
    found = metrics.get(MISMATCH)
    if found is None or limit is None or (math.isfinite(found) and found <= limit):
        return
    raise TrainingError(
        f"step {step}: train/mismatch_k3 is {found:.3g}, and train.max_mismatch_k3 is {limit:g}: engine and trainer "
        "do not have the same model; the step is not saved. Compare the steps before in metrics.jsonl: a jump means "
        "other weights or wrong log-probs on a server (its log; rollout.sglang.sync.verify=true), a slow rise a lack "
        "of precision (model.dtype, quantization, rollout.routing_replay) or rollouts that are too old"
    )
