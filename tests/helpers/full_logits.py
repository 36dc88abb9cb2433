"""The loss of a step from the full logits of a `transformers` model in float64, by the definitions and autograd alone.

Nothing here comes from the package but the record types and sections: L = sum w S / N_s + c sum v D / N_d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_hdpo.model.config import OptimizerConfig
from megatron_hdpo.types.learning import Example, LossSpec, Scoring


@dataclass
class Reference:
    """Expected results of one step: gradients by Hugging Face name, metrics by name."""

    loss: float
    gradients: dict[str, np.ndarray]
    metrics: dict[str, float]


def load(path: Path) -> PreTrainedModel:
    # The default implementation of experts does not support float64.
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager").eval()


def by_saved_name(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A model's tensors by the names of its checkpoint: `transformers` holds a layer's experts in two tensors,
    and saves each expert's matrices."""
    saved = {}
    for name, value in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, matrix in enumerate(value):
                for part, half in zip(("gate_proj", "up_proj"), np.split(matrix, 2), strict=True):
                    saved[name.replace("gate_up_proj", f"{expert}.{part}.weight")] = half
        elif name.endswith("experts.down_proj"):
            for expert, matrix in enumerate(value):
                saved[name.replace("down_proj", f"{expert}.down_proj.weight")] = matrix
        else:
            saved[name] = value
    return saved


def response_logits(model: PreTrainedModel, context: np.ndarray, response: np.ndarray) -> Tensor:
    """[T, V]: row t is what the model says after the context and t response tokens, one sequence at a time."""
    ids = torch.tensor([*context.tolist(), *response.tolist()])
    return model(ids[None]).logits[0, len(context) - 1 : -1]


def reference_step(path: Path, examples: Sequence[Example], spec: LossSpec) -> Reference:
    model = load(path)
    surrogate_count = sum(e.surrogate_count for e in examples)
    distill_count = sum(e.distill_count for e in examples)
    sums: dict[str, float] = dict.fromkeys(_SUMS, 0.0)
    loss = torch.zeros((), dtype=torch.float64)
    for example in examples:
        logits = response_logits(model, example.prompt_ids, example.response_ids)
        for t in range(len(example.response_ids)):
            logprobs_V = torch.log_softmax(logits[t] / spec.temperature, -1)
            surrogate = _surrogate(example, t, logprobs_V, spec, sums)
            _entropy(example, t, logprobs_V.detach(), spec, sums)
            if surrogate_count:
                loss = loss + surrogate / surrogate_count
            if spec.distill is not None and example.target is not None:
                term = _distillation(example, t, torch.softmax(logits[t] / spec.distill.temperature, -1), spec, sums)
                loss = loss + spec.distill.coefficient * term / distill_count
    loss.backward()
    gradients = by_saved_name({name: p.grad.numpy() for name, p in model.named_parameters()})
    return Reference(float(loss), gradients, _metrics(sums, surrogate_count, distill_count))


def norm(tensors: dict[str, np.ndarray]) -> float:
    """The Euclidean norm of all tensors as one vector."""
    return float(np.sqrt(sum(np.sum(tensor.astype(np.float64) ** 2) for tensor in tensors.values())))


def first_step_of_adamw(
    gradients: dict[str, np.ndarray], before: dict[str, np.ndarray], config: OptimizerConfig
) -> dict[str, np.ndarray]:
    """How far each weight moves, by AdamW's definition from gradients clipped by their norm.

    At the first step both moments are the gradient's own. A learning rate that warms up begins at its start.
    """
    total = norm(gradients)
    lr = config.lr * (config.warmup_start if config.warmup_steps else 1.0)
    moved = {}
    for name, gradient in gradients.items():
        clipped = gradient * min(1.0, config.clip_grad / total)
        decay = config.weight_decay if gradient.ndim > 1 else 0.0
        moved[name] = -lr * (decay * before[name] + clipped / (np.abs(clipped) + config.eps))
    return moved


def assert_same_tensors(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    """The distance of each tensor, relative to its norm (or to a thousandth of all tensors' norm, if that is more)."""
    assert actual.keys() == expected.keys()
    floor = 1e-3 * norm(expected)
    off = {n: np.linalg.norm(actual[n] - e) / max(np.linalg.norm(e), floor) for n, e in expected.items()}
    worst = max(off, key=off.__getitem__)
    assert off[worst] < tolerance, f"{worst} is off by {off[worst]:.1e}; all: {off}"


_SUMS = (
    "surrogate", "tokens", "nll", "clipped", "k3", "abs", "entropy", "own", "taught_entropy",
    "jsd", "weighted_jsd", "targets", "covered", "top1",
)  # fmt: skip


def _taught(example: Example) -> bool:
    """Whether any token of an example has a weight in the divergence."""
    return example.distill_weights_T is not None and bool(np.any(example.distill_weights_T))


def _entropy(example: Example, t: int, logprobs_V: Tensor, spec: LossSpec, sums: dict[str, float]) -> None:
    """Of tokens that have a weight in a loss: all such of own rollouts, and those with a target."""
    entropy = -float((logprobs_V.exp() * logprobs_V).sum())
    taught = example.distill_weights_T is not None and example.distill_weights_T[t] != 0
    runs = np.any(example.surrogate_weights_T * example.advantages_T) or _taught(example)
    if example.own_rollout and runs and (example.surrogate_weights_T[t] != 0 or taught):
        sums["entropy"] += entropy
        sums["own"] += 1
    if taught and spec.distill is not None:
        sums["taught_entropy"] += entropy


def _surrogate(example: Example, t: int, logprobs_V: Tensor, spec: LossSpec, sums: dict[str, float]) -> Tensor:
    weight = float(example.surrogate_weights_T[t])
    if weight == 0.0:
        return torch.zeros((), dtype=torch.float64)
    config, advantage = spec.surrogate, float(example.advantages_T[t])
    own = logprobs_V[int(example.response_ids[t])]
    old = own.detach() if example.old_logprobs_T is None else torch.tensor(float(example.old_logprobs_T[t])).double()
    rollout = old if example.rollout_logprobs_T is None else torch.tensor(float(example.rollout_logprobs_T[t])).double()
    ratio = torch.exp(own - old)
    unclipped = -advantage * ratio
    clipped = -advantage * torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high)
    token = unclipped if unclipped >= clipped else clipped
    if advantage < 0 and config.dual_clip is not None and token > -advantage * config.dual_clip:
        token = torch.tensor(-advantage * config.dual_clip).double()
    if config.importance_cap is not None:
        token = token * min(config.importance_cap, float(torch.exp(old - rollout)))
    if np.any(example.surrogate_weights_T * example.advantages_T) or example.target is not None:  # inert: no metrics
        log_ratio = float(old - rollout)
        sums["tokens"] += 1
        sums["nll"] -= float(own.detach())
        sums["clipped"] += float(clipped > unclipped)
        sums["k3"] += np.exp(log_ratio) - 1 - log_ratio
        sums["abs"] += abs(log_ratio)
    sums["surrogate"] += weight * float(token.detach())
    return weight * token


def _distillation(example: Example, t: int, q_V: Tensor, spec: LossSpec, sums: dict[str, float]) -> Tensor:
    """b KL(p^|M) + (1 - b) KL(q|M) over the whole vocabulary, p^ the teacher renormalised on its top k."""
    assert spec.distill is not None and example.target is not None and example.distill_weights_T is not None
    beta, weight = spec.distill.beta, float(example.distill_weights_T[t])
    ids = torch.from_numpy(example.target.ids_TK[t]).long()
    masses = torch.from_numpy(example.target.logprobs_TK[t]).double().exp()
    p_V = torch.zeros_like(q_V).detach()
    p_V[ids] = masses / masses.sum()
    m_V = beta * p_V + (1 - beta) * q_V
    teacher_leg = (p_V[ids] * (p_V[ids] / m_V[ids]).log()).sum()
    student_leg = (q_V * (q_V / m_V).log()).sum()
    value = beta * teacher_leg + (1 - beta) * student_leg
    if weight:
        sums["jsd"] += float(value.detach())
        sums["weighted_jsd"] += weight * float(value.detach())
        sums["targets"] += 1
        sums["covered"] += float(torch.minimum(p_V, q_V).sum().detach())
        sums["top1"] += float(q_V[ids[masses.argmax()]].detach())
    return weight * value


def _metrics(sums: dict[str, float], surrogate_count: float, distill_count: float) -> dict[str, float]:
    metrics = {"distill/tokens": sums["targets"]}
    if surrogate_count:
        metrics["train/surrogate_loss"] = sums["surrogate"] / surrogate_count
    if sums["tokens"]:
        names = {"nll": "nll", "clip_fraction": "clipped"}
        names |= {"mismatch_k3": "k3", "mismatch_abs": "abs"}
        metrics |= {f"train/{name}": sums[key] / sums["tokens"] for name, key in names.items()}
    if sums["own"]:
        metrics |= {"train/entropy": sums["entropy"] / sums["own"], "train/entropy_tokens": sums["own"]}
    if sums["targets"]:
        metrics["distill/loss"] = sums["weighted_jsd"] / distill_count
        metrics["distill/divergence"] = sums["jsd"] / sums["targets"]
        metrics["distill/entropy"] = sums["taught_entropy"] / sums["targets"]
        metrics["distill/covered_mass"] = sums["covered"] / sums["targets"]
        metrics["distill/student_mass_at_top1"] = sums["top1"] / sums["targets"]
    return metrics


@torch.no_grad()
def reference_score(model: PreTrainedModel, scoring: Scoring) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probs [T], entropy [T] and all log-probs [T, V] at the scoring's temperature."""
    logits = response_logits(model, scoring.context_ids, scoring.response_ids) / scoring.temperature
    logprobs_TV = torch.log_softmax(logits, -1)
    logprobs_T = logprobs_TV[torch.arange(len(logits)), torch.from_numpy(scoring.response_ids).long()]
    return logprobs_T.numpy(), -(logprobs_TV.exp() * logprobs_TV).sum(-1).numpy(), logprobs_TV.numpy()
