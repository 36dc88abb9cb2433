"""Gradients of a whole method by parameter name: through the learner on any layout, and by float64 autograd.

How a method's test uses it:

    def losses(models: Models, groups) -> Tensor:      # the method's definition, from logits, in float64
        logits = models.student(group.prompt_ids, ids)     # [T, V] with gradient, the weights being updated
        taught = models.teacher(other_context, ids)        # [T, V] without, the teacher's
        before = models.before(group.prompt_ids, ids)      # [T, V] without, the policy before this step's updates
        ...

    CASES = {"name": Case(build, hand_made_groups)}        # `build` makes the objective; both module-level functions

    @pytest.fixture(scope="module")
    def found(tmp_path_factory):                           # one world per layout for all cases of the file
        return run_cases(CASES, make_models(tmp_path_factory.mktemp("models")), ["one_rank", "tp2_dp2"])

    assert_same_gradients(found.results["tp2_dp2"]["name"].gradients, reference_gradients(found.paths, losses, groups))

The student, what it becomes when the policy moves within a step (`Case.moved`), and a teacher of another size, whose
vocabulary is padded further, are tiny random checkpoints. An external teacher is the default; with Case.teacher=None
the teacher is the policy before the step, as in self-distillation (`Models.before` is its counterpart then).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed_helper import run_ranks
from full_logits import response_logits
from tiny_policy import SIZES, VOCAB, build_policy, gradients_of, joined
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from megatron_hdpo.model.config import ModelConfig
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.sampling.step_rollouts import StepRollouts, gather_counts, gather_outlines, on_every_rank
from megatron_hdpo.teachers.external import ExternalTeacher
from megatron_hdpo.teachers.teacher import PolicyTeacher, Teacher
from megatron_hdpo.tracking.console import Console
from megatron_hdpo.training.learner import Learner
from megatron_hdpo.types.learning import Objective
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, Group, Sample
from megatron_hdpo.weights.load import load_hf

# name: (world size, tensor, pipeline); replicas take what is left.
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one_rank": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "cp2": (2, {"context": 2}),
    "pp2": (2, {"pipeline": 2}),
    "tp2_dp2": (4, {"tensor": 2}),
    "pp2_dp2": (4, {"pipeline": 2}),
}
SMALL: dict[str, Any] = SIZES | {"num_hidden_layers": 2}
TEACHER: dict[str, Any] = SMALL | {"hidden_size": 48, "vocab_size": 520, "head_dim": 16}
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "student": lambda: LlamaConfig(**SMALL, tie_word_embeddings=False),
    "moved": lambda: LlamaConfig(**SMALL, tie_word_embeddings=False),
    "teacher": lambda: Qwen3Config(**TEACHER, tie_word_embeddings=True),
}
Paths = dict[str, Path]


@dataclass(frozen=True)
class Case:
    """A method on groups. objective, groups: module-level functions, called on every rank. teacher: the model that
    teaches, None for the policy before the step. reference: the model of the KL penalty. moved: the policy holds the
    weights `moved` by the time of the update, as after an earlier update of the step. budget: tokens per micro-batch.
    dealt: each group is on one rank, as after sampling; otherwise on all.
    """

    objective: Callable[[], Objective]
    groups: Callable[[], Sequence[Group]]
    teacher: str | None = "teacher"
    reference: str = "teacher"
    moved: bool = False
    budget: int = 60
    head_chunk: int = 1024
    step: int = 0
    dealt: bool = False


@dataclass
class Result:
    """Gradients of the last update by Hugging Face name (on rank 0), and the step's metrics."""

    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """Results of rank 0 by layout and case, and the checkpoints that they come from."""

    paths: Paths
    results: dict[str, dict[str, Result]]


def make_models(folder: Path) -> Paths:
    """Random checkpoints: no norm or bias at its default."""
    paths = {}
    for seed, (name, config) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                scale = 0.3 if parameter.dim() == 1 else 0.15
                parameter.normal_(mean=1.0 if "norm" in parameter_name else 0.0, std=scale)
        paths[name] = folder / name
        model.save_pretrained(paths[name])
    _stay_close(paths)
    return paths


def _stay_close(paths: Paths) -> None:
    """Make `moved` a tenth of the way from the student to what it was: ratios inside the clip and outside."""
    student, moved = (AutoModelForCausalLM.from_pretrained(paths[n], dtype=torch.float32) for n in ("student", "moved"))
    with torch.no_grad():
        for ours, theirs in zip(moved.parameters(), student.parameters(), strict=True):
            ours.lerp_(theirs, 0.9)
    moved.save_pretrained(paths["moved"])


def run_cases(cases: dict[str, Case], paths: Paths, layouts: Sequence[str]) -> Found:
    """Every case on every layout, one world per layout."""
    results = {}
    for layout in layouts:
        world, split = LAYOUTS[layout]
        results[layout] = run_ranks(world, _all_cases, cases, paths, split, timeout=240.0)[0]
    return Found(paths, results)


def _all_cases(cases: dict[str, Case], paths: Paths, split: dict[str, int]) -> dict[str, Result]:
    with joined(**split) as context:
        return {name: run_case(case, paths, context) for name, case in cases.items()}


def run_case(case: Case, paths: Paths, context: ParallelContext) -> Result:
    """One step of the learner, in which the optimizer does not step but the gradients are kept."""
    policy = build_policy(paths["student"], context, budget=case.budget, head_chunk=case.head_chunk)
    result = Result()
    policy.update = partial(_measure, policy, case, paths, result)  # type: ignore[method-assign]
    objective = case.objective()
    learner = Learner(
        policy,
        objective,
        _teacher(case.teacher, policy, paths),
        Console(enabled=False),
        reference=_teacher(case.reference, policy, paths),
    )
    groups = [objective.keep_privileged(replace(group)) for group in case.groups()]
    rollouts = _dealt(groups, context) if case.dealt else on_every_rank(groups)
    metrics = objective.metrics(rollouts.outlines, gather_counts(rollouts, objective, context))
    result.metrics = learner.learn(rollouts, case.step) | metrics
    return result


def _dealt(groups: Sequence[Group], context: ParallelContext) -> StepRollouts:
    own = {i: group for i, group in enumerate(groups) if i % context.world_size == context.rank}
    return gather_outlines(own, context, [group.problem for group in groups])


def _teacher(name: str | None, policy: Policy, paths: Paths) -> Teacher:
    if name is None:
        return PolicyTeacher(policy)
    return ExternalTeacher(paths[name], policy, ModelConfig(path=str(paths[name]), dtype="float32"))


def _measure(policy: Policy, case: Case, paths: Paths, result: Result, *args: Any) -> dict[str, float]:
    if case.moved:
        load_hf(policy.model, policy.architecture, policy.context, paths["moved"])
    examples, spec, on_progress, teacher_head, _ = args
    metrics = policy.accumulate_gradients(examples, spec, on_progress, teacher_head)
    gradients = gradients_of(policy)
    if policy.context.rank == 0:
        result.gradients = gradients
    return metrics | {"train/skipped": 0.0}


class Models:
    """Logits [T, V] in float64 at each token of a response after a context; only the student's have a gradient."""

    def __init__(self, paths: Paths, moved: bool = False) -> None:
        models = {n: AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64).eval() for n, p in paths.items()}
        self.trained = models["moved" if moved else "student"]
        self._before, self._teacher = models["student"], models["teacher"]

    def student(self, context: np.ndarray, response: np.ndarray) -> Tensor:
        """The weights that are updated."""
        return response_logits(self.trained, context, response)

    @torch.no_grad()
    def before(self, context: np.ndarray, response: np.ndarray) -> Tensor:
        """The policy before the updates of the step."""
        return response_logits(self._before, context, response)

    @torch.no_grad()
    def teacher(self, context: np.ndarray, response: np.ndarray) -> Tensor:
        """The external teacher, over the student's vocabulary."""
        return response_logits(self._teacher, context, response)[:, :VOCAB]


def reference_gradients(paths: Paths, loss: Callable[[Models], Tensor], moved: bool = False) -> dict[str, np.ndarray]:
    """Gradients of a hand-written loss by Hugging Face name."""
    models = Models(paths, moved)
    value = loss(models)
    if value.requires_grad:
        value.backward()
    named = models.trained.named_parameters()
    return {name: (torch.zeros_like(p) if p.grad is None else p.grad).numpy() for name, p in named}


def assert_same_gradients(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 2e-4
) -> None:
    """Equal up to float32, each tensor in units of its largest entry (of the whole gradient's, if that is far more)."""
    assert found.keys() == expected.keys()
    largest = max(float(np.abs(values).max()) for values in expected.values())
    for name, values in expected.items():
        unit = max(float(np.abs(values).max()), 1e-3 * largest, 1e-30)
        worst = float(np.abs(found[name] - values).max()) / unit
        assert worst < tolerance, f"{name}: off by {worst:.1e} of its largest entry, {unit:.1e}"


def sample_of(
    rng: np.random.Generator, reward: float, length: int, *, cut: bool = False, text: str = "so it is 4"
) -> Sample:
    """A rollout of random tokens; the engine's log-probs are about those of a random model."""
    ids = rng.integers(0, VOCAB, length).astype(np.int32)
    logprobs = rng.normal(-6.0, 0.7, length).astype(np.float32)
    completion = Completion(ids, logprobs, "length" if cut else "stop", np.zeros(length, dtype=np.int32))
    return Sample(completion, text, reward)


def group_of(rng: np.random.Generator, samples: Sequence[Sample], number: int = 0, prompt: int = 5) -> Group:
    """A group with a random prompt."""
    problem = Problem(f"sums/{number}", "sums", "2 + 2?", "4")
    return Group(problem, rng.integers(0, VOCAB, prompt).astype(np.int32), list(samples))


def hand_made_groups() -> list[Group]:
    """Mixed, all right, all wrong, one right, one wrong, one rollout, none; a cut response, one of a single token."""
    rng = np.random.default_rng(7)
    rewards = [[1, 0, 1, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 1], [1], []]
    groups = []
    for number, row in enumerate(rewards):
        samples = [
            sample_of(rng, float(reward), (7, 1, 10, 4)[i], cut=number == 0 and i == 3) for i, reward in enumerate(row)
        ]
        groups.append(group_of(rng, samples, number, prompt=3 + number))
    return groups
