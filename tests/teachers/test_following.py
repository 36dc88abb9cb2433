"""Snapshot, EMA and external teachers: their true weights at each step, and after a resume the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_helper import run_ranks
from layout_cases import share
from tiny_policy import (
    MODELS,
    OPTIMIZER,
    SPEC,
    VOCAB,
    build_policy,
    joined,
    make_checkpoint,
    make_examples,
    make_scorings,
    weights_of,
)
from transformers import AutoModelForCausalLM, Qwen3Config

from megatron_hdpo.checkpoint.store import CheckpointError, CheckpointStore
from megatron_hdpo.model.config import ModelConfig, ModelError
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.objectives.base import BaseObjective
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.sampling.step_rollouts import on_every_rank
from megatron_hdpo.teachers.config import EmaTeacherConfig, SnapshotTeacherConfig
from megatron_hdpo.teachers.external import ExternalTeacher, check_same_vocabulary
from megatron_hdpo.teachers.teacher import Teacher
from megatron_hdpo.teachers.weight_copies import EmaTeacher, SnapshotTeacher
from megatron_hdpo.tracking.console import Console
from megatron_hdpo.training.learner import Learner
from megatron_hdpo.weights.host import copy_to_host

LAYOUTS = {"tp2": (2, 1), "pp2": (1, 2), "dp2": (1, 1)}
FOLLOWED = ["tp2", "pp2"]
EVERY, DECAY, UPDATES, STEPS = 2, 0.75, 2, 5
Weights = dict[str, np.ndarray]


class Examples(BaseObjective):
    """Learns from hand-made examples; remembers how many steps it has begun."""

    loss = SPEC
    begun = 0

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def begin_step(self, step: int, groups: Any) -> None:
        super().begin_step(step, groups)
        self.begun += 1

    def examples(self, groups: Any, scores: Any, totals: Any = None) -> list:
        return share(self.policy, make_examples(seed=self.step))

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun}

    def load_state_dict(self, state: Any) -> None:
        self.begun = state["begun"]


TEACHERS = {
    "snapshot": lambda p: SnapshotTeacher(p, SnapshotTeacherConfig(kind="snapshot", every=EVERY)),
    "snapshot by update": lambda p: SnapshotTeacher(
        p, SnapshotTeacherConfig(kind="snapshot", every=3, clock="optimizer_step")
    ),
    "ema": lambda p: EmaTeacher(p, EmaTeacherConfig(kind="ema", decay=DECAY)),
    "ema by update": lambda p: EmaTeacher(p, EmaTeacherConfig(kind="ema", decay=DECAY, clock="optimizer_step")),
}


def _learner(path: Path, context: ParallelContext, kind: str, dtype: str = "float32") -> Learner:
    policy = build_policy(path, context, optimizer=OPTIMIZER, dtype=dtype)
    return Learner(policy, Examples(policy), TEACHERS[kind](policy), Console(enabled=False), updates_per_step=UPDATES)


def _seen(teacher: Teacher) -> tuple[Weights, list[np.ndarray]]:
    """The weights that score, and what they say."""
    with teacher.scorer() as scorer:
        scores = scorer.score(make_scorings()[1:3])
        return weights_of(scorer), [scores[key].logprobs_T for key in sorted(scores)]


def _run(learner: Learner, steps: range) -> dict[str, list[Any]]:
    """Return the policy's weights after every update, and the teacher's after every step."""
    found: dict[str, list[Any]] = {"policy": [weights_of(learner.policy)], "teacher": [_seen(learner.teacher)[0]]}
    update = learner.policy.update

    def recorded(*args: Any) -> dict[str, float]:
        metrics = update(*args)
        found["policy"].append(weights_of(learner.policy))
        return metrics

    learner.policy.update = recorded  # type: ignore[method-assign]
    for step in steps:
        learner.learn(on_every_rank([]), step)
        found["teacher"].append(_seen(learner.teacher)[0])
    learner.policy.update = update  # type: ignore[method-assign]
    return found


def _resumed(path: Path, folder: Path, context: ParallelContext, kind: str, dtype: str) -> dict[str, Any]:
    """Five steps on end, and three, a checkpoint, and two more by another process's objects."""
    learner = _learner(path, context, kind, dtype)
    store = CheckpointStore(folder, context, keep=2)
    for step in range(3):
        learner.learn(on_every_rank([]), step)
    saved = store.save(3, learner.policy, learner.state_dict())
    for step in range(3, STEPS):
        learner.learn(on_every_rank([]), step)

    again = _learner(path, context, kind, dtype)
    store.load(saved, again.policy)
    again.load_state_dict(store.load_learner_state(saved))
    at_load = again.objective.begun
    for step in range(3, STEPS):
        again.learn(on_every_rank([]), step)
    ours, theirs = _seen(learner.teacher), _seen(again.teacher)
    state, restored = learner.teacher.state_dict(), again.teacher.state_dict()
    return {
        "weights": all(np.array_equal(ours[0][name], theirs[0][name]) for name in ours[0]),
        "bits": all(torch.equal(state.weights[name], restored.weights[name]) for name in state.weights),
        "scores": all(np.array_equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True)),
        "ticks": (state.values, restored.values),
        "objective": (at_load, again.objective.begun),
    }


def _damaged(path: Path, folder: Path, context: ParallelContext) -> list[str]:
    learner, store = _learner(path, context, "ema"), CheckpointStore(folder, context, keep=2)
    saved = store.save(1, learner.policy, learner.state_dict())
    (file,) = saved.glob(f"teacher_tp{context.groups.tp.rank()}_pp{context.groups.pp.rank()}.pt")
    context.barrier("saved")
    errors = []
    for damage in (lambda: file.write_bytes(file.read_bytes()[:100]), lambda: file.unlink(missing_ok=True)):
        if context.dp_rank == 0:
            damage()
        context.barrier("damaged")
        with pytest.raises(CheckpointError, match="damaged or missing") as caught:
            store.load_learner_state(saved)
        errors.append(str(caught.value))
    return errors


def _external(path: Path, teacher_path: Path, context: ParallelContext) -> dict[str, Any]:
    learner = _learner(path, context, "ema")
    policy = learner.policy
    learner.teacher = teacher = ExternalTeacher(teacher_path, policy, ModelConfig(path="", dtype="float32"))
    before, own = _seen(teacher), weights_of(policy)
    learner.learn(on_every_rank([]), 0)
    after = _seen(teacher)
    # As on a GPU: weights come from their resting place for the scoring alone.
    teacher.on_device, teacher.host_weights = True, copy_to_host(teacher.policy.model)
    moved_in = _seen(teacher)
    at_rest = all(
        p.data_ptr() == teacher.host_weights[n].data_ptr() for n, p in teacher.policy.model.named_parameters()
    )
    return {
        "rests": at_rest and all(np.array_equal(a, b) for a, b in zip(before[1], moved_in[1], strict=True)),
        "moved": any(not np.array_equal(own[name], values) for name, values in weights_of(policy).items()),
        "same": all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True)),
        "scores": before[1],
    }


def _visit(paths: dict[str, Path], folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for layout, (tensor, pipeline) in LAYOUTS.items():
        with joined(tensor, pipeline) as context:
            for kind in TEACHERS if layout in FOLLOWED else ():
                found = _run(_learner(paths["student"], context, kind), range(STEPS))
                seen[layout, kind] = found if context.is_leader else None
            where = folder / layout
            for kind, dtype in (("snapshot", "float32"), ("ema", "bfloat16")):
                seen[layout, "resumed", kind] = _resumed(paths["student"], where / kind, context, kind, dtype)
            seen[layout, "damaged"] = _damaged(paths["student"], where / "damaged", context)
            seen[layout, "external"] = _external(paths["student"], paths["external"], context)
            with pytest.raises(ModelError, match="vocabulary of 299 tokens, the model 520"):
                big = build_policy(paths["external"], context)
                ExternalTeacher(paths["student"], big, ModelConfig(path="", dtype="float32"))
    return seen


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    sizes = {**MODELS["llama"]().to_dict(), "num_hidden_layers": 2, "hidden_size": 48, "vocab_size": 520}
    config = Qwen3Config(**{key: sizes[key] for key in sizes if key in _SHARED}, head_dim=16, tie_word_embeddings=True)
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "external")
    return {"student": make_checkpoint("llama_tied", folder), "external": folder / "external"}


_SHARED = (
    "num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip


@pytest.fixture(scope="module")
def ranks(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_ranks(2, _visit, paths, tmp_path_factory.mktemp("runs"), timeout=240.0)


def _expected(kind: str, policy: list[Weights]) -> list[Weights]:
    """The teacher after each step, from the policy after each update."""
    clock = 1 if kind.endswith("update") else UPDATES
    teacher, seen = policy[0], [policy[0]]
    for update in range(1, len(policy)):
        if update % clock == 0:
            ticks = update // clock
            if kind.startswith("ema"):
                teacher = {n: DECAY * values + (1 - DECAY) * policy[update][n] for n, values in teacher.items()}
            elif ticks % (3 if kind.endswith("update") else EVERY) == 0:
                teacher = policy[update]
        if update % UPDATES == 0:
            seen.append(teacher)
    return seen


@pytest.mark.parametrize("layout", FOLLOWED)
@pytest.mark.parametrize("kind", TEACHERS)
def test_weights_at_each_step(kind: str, layout: str, ranks) -> None:
    found = ranks[0][layout, kind]
    expected = _expected(kind, found["policy"])
    assert len(found["policy"]) == 1 + STEPS * UPDATES and len(found["teacher"]) == len(expected) == 1 + STEPS
    for step, (seen, wanted) in enumerate(zip(found["teacher"], expected, strict=True)):
        for name, values in wanted.items():
            tolerance = {"rtol": 0, "atol": 1e-6} if kind.startswith("ema") else {"rtol": 0, "atol": 0}
            np.testing.assert_allclose(seen[name], values, **tolerance, err_msg=f"{name} after {step} steps")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not np.allclose(found["teacher"][-1][name], found["policy"][0][name], atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["snapshot", "ema"])
def test_a_resume_gives_the_same_bits(kind: str, layout: str, ranks) -> None:
    for seen in ranks:
        found = seen[layout, "resumed", kind]
        assert found["weights"] and found["bits"] and found["scores"]
        assert found["ticks"] == ({"ticks": STEPS}, {"ticks": STEPS})
        assert found["objective"] == (3, STEPS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_teacher_is_refused(layout: str, ranks) -> None:
    for seen in ranks:
        assert all("delete" in error for error in seen[layout, "damaged"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_external_teacher(layout: str, ranks, paths: dict[str, Path]) -> None:
    """It scores as its checkpoint does over the student's vocabulary, whatever the policy learns meanwhile."""
    model = AutoModelForCausalLM.from_pretrained(paths["external"], dtype=torch.float64)
    for seen in ranks:
        found = seen[layout, "external"]
        assert found["moved"] and found["same"] and found["rests"]
        for scoring, logprobs in zip(make_scorings()[1:3], found["scores"], strict=False):
            ids = torch.tensor([*scoring.context_ids.tolist(), *scoring.response_ids.tolist()])
            logits = model(ids[None]).logits[0, len(scoring.context_ids) - 1 : -1, :VOCAB] / scoring.temperature
            expected = logits.log_softmax(-1)[range(len(scoring.response_ids)), scoring.response_ids.astype(int)]
            np.testing.assert_allclose(logprobs, expected.detach().numpy(), atol=2e-5)
    assert any(seen[layout, "external"]["scores"] for seen in ranks)


def test_a_vocabulary_is_compared_id_by_id() -> None:
    ids = {"a": 0, "b": 1, "c": 2}
    check_same_vocabulary(dict(reversed(ids.items())), ids, "there")
    for other, named in (({**ids, "b": 2, "c": 1}, "'b'"), ({"a": 0, "b": 1}, "'c'"), ({**ids, "d": 3}, "'d'")):
        with pytest.raises(ModelError, match=f"the tokenizer of there is not the model's: token {named}"):
            check_same_vocabulary(other, ids, "there")
