"""Checkpoints: a run that was stopped goes on as if it had not been, bit for bit, and nothing half-written is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from distributed_helper import run_ranks
from layout_cases import digest, share
from megatron.core import dist_checkpointing
from tiny_policy import SPEC, build_policy, joined, make_checkpoint, make_examples, weights_of

from megatron_hdpo.checkpoint.store import CheckpointError, CheckpointStore, read_state
from megatron_hdpo.model.architecture import read_architecture
from megatron_hdpo.model.config import OptimizerConfig
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.parallel.layout import ParallelConfig

# A schedule that never stands still: a step count that was not restored shows in the learning rate.
OPTIMIZER = OptimizerConfig(lr=0.02, eps=1e-6, weight_decay=0.1, warmup_steps=3, schedule="cosine")
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one_rank": (1, {}),
    "bfloat16": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
    "cp2": (2, {"context": 2}),
    "pp2_vp2": (2, {"pipeline": 2, "virtual_stages": 2}),
    "ep2": (2, {"expert": 2}),
}
# Each reads what the one before wrote: all of them for a model with experts, some for one with tied embeddings.
RESHARDED: dict[str, dict[str, Any]] = {
    "tp2_sp": {"tensor": 2, "sequence": True},
    "dp2": {},
    "pp2_vp2": {"pipeline": 2, "virtual_stages": 2},
    "ep2": {"expert": 2},
    "cp2": {"context": 2},
    "pp2": {"pipeline": 2},
    "tp2_etp2_sp": {"tensor": 2, "expert_tensor": 2, "sequence": True},
}
Steps = list[dict[str, float]]


def _policy(path: Path, context: ParallelContext, dtype: str = "float32") -> Policy:
    return build_policy(path, context, optimizer=OPTIMIZER, total_steps=6, dtype=dtype)


def _steps(policy: Policy, steps: range) -> Steps:
    return [policy.update(share(policy, make_examples(seed=step)), SPEC) for step in steps]


def _uninterrupted_and_resumed(
    path: Path, folder: Path, context: ParallelContext, dtype: str = "float32"
) -> dict[str, Any]:
    policy = _policy(path, context, dtype)
    store = CheckpointStore(folder, context, keep=2)
    none_yet = store.latest()
    _steps(policy, range(2))
    saved = store.save(2, policy)
    going_on = _steps(policy, range(2, 5))
    end = weights_of(policy)

    fresh, again = _policy(path, context, dtype), CheckpointStore(folder, context, keep=2)
    found = again.latest()
    state = again.load(found, fresh)
    resumed = _steps(fresh, range(2, 5))
    return {
        "none_yet": none_yet,
        "found": (found == saved, found.name),
        "step": state.step,
        "metrics": (going_on, resumed),
        "weights": (digest(end), digest(weights_of(fresh))),
        "end": end if context.is_leader else None,
    }


def _keep(policy: Policy, folder: Path) -> list[list[str]]:
    """The checkpoints on disk after each of five saves."""
    store, seen = CheckpointStore(folder, policy.context, keep=2), []
    for step in (1, 2, 9, 10, 11):
        store.save(step, policy)
        seen.append(sorted(entry.name for entry in (folder / "checkpoints").iterdir()))
        policy.context.barrier("looked")
    return seen


@contextmanager
def _broken_save() -> Iterator[None]:
    """Let the writer of every rank die after it has written most of a checkpoint."""
    stock = dist_checkpointing.save

    def fail() -> None:
        raise OSError("no space left on device")

    def save(*args: Any, **kwargs: Any) -> Any:
        request = stock(*args, **kwargs)
        request.add_finalize_fn(fail)
        return request

    dist_checkpointing.save = save
    try:
        yield
    finally:
        dist_checkpointing.save = stock


def _half_written(path: Path, policy: Policy, folder: Path) -> dict[str, Any]:
    store = CheckpointStore(folder, policy.context, keep=2)
    store.save(1, policy)
    before, error = digest(weights_of(policy)), None
    _steps(policy, range(1))
    with _broken_save():
        try:
            store.save(2, policy)
        except OSError as caught:
            error = str(caught)
    partial = (folder / "checkpoints" / "step_00000002.partial").is_dir()
    found = store.latest().name
    fresh = _policy(path, policy.context)
    store.load(store.latest(), fresh)
    loaded = digest(weights_of(fresh)) == before
    # The same step once more, over what the broken attempt left behind.
    store.save(2, policy)
    return {"error": error, "partial": partial, "found": (found, store.latest().name), "loaded": loaded}


def _weights_only(path: Path, other: Path, folder: Path, context: ParallelContext) -> dict[str, Any]:
    store, policy = CheckpointStore(folder, context, keep=1), _policy(path, context)
    before, had = digest(weights_of(policy)), store.has_weights("teacher")
    store.save_weights("teacher", policy.model)
    _steps(policy, range(1))
    moved = digest(weights_of(policy)) != before
    store.save(1, policy)
    store.save(2, policy)
    store.load_weights("teacher", policy.model)
    return {
        "has": (had, store.has_weights("teacher")),
        "moved": moved,
        "read back": digest(weights_of(policy)) == before,
        "latest": store.latest().name,
        "missing": _error(lambda: store.load_weights("reference", policy.model)),
        "other model": _error(lambda: store.load(store.latest(), _policy(other, context))),
    }


def _error(action: Any) -> str | None:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return None


def _one_rank(path: Path, other: Path, folder: Path) -> dict[str, Any]:
    with joined() as context:
        seen: dict[str, Any] = {"one_rank": _uninterrupted_and_resumed(path, folder / "one_rank", context)}
        # Main weights are a copy of their own then, with more bits than the model's.
        seen["bfloat16"] = _uninterrupted_and_resumed(path, folder / "bfloat16", context, "bfloat16")
        seen["keep"] = _keep(_policy(path, context), folder / "keep")
        seen["weights only"] = _weights_only(path, other, folder / "weights", context)
        seen["half-written"] = _half_written(path, _policy(path, context), folder / "half")
        # Written by two replicas, read by one.
        policy, store = _policy(path, context), CheckpointStore(folder / "dp2", context, keep=2)
        store.load(store.latest(), policy)
        seen["fewer replicas"] = (_steps(policy, range(2, 5)), weights_of(policy))
    return seen


def _two_ranks(path: Path, experts: Path, folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name in [name for name, (ranks, _) in LAYOUTS.items() if ranks == 2]:
        with joined(**LAYOUTS[name][1]) as context:
            seen[name] = _uninterrupted_and_resumed(experts if name == "ep2" else path, folder / name, context)
            if name in ("cp2", "ep2"):
                continue
            if name != "tp2":
                store = CheckpointStore(folder / "tp2", context, keep=2)
                policy = _policy(path, context)
                before = digest(weights_of(policy))
                seen[name]["refused"] = _error(lambda: store.load(store.latest(), policy))  # noqa: B023
                seen[name]["untouched"] = digest(weights_of(policy)) == before
            else:
                seen["keep"] = _keep(_policy(path, context), folder / "keep2")
                seen["half-written"] = _half_written(path, _policy(path, context), folder / "half2")
    return seen


def _through_layouts(path: Path, folder: Path, dtype: str, names: list[str]) -> dict[str, Any]:
    """A checkpoint read and written again by one layout after another, and at last read by the first, which took the
    steps before it. What each does next, from the checkpoint."""
    seen: dict[str, Any] = {}
    source: CheckpointStore | None = None
    for number, name in enumerate([*names, names[0]]):
        with joined(**RESHARDED[name]) as context:
            policy = _policy(path, context, dtype)
            if source is None:
                _steps(policy, range(2))
            else:
                source.context = context
                source.load(source.latest(), policy)
            source = CheckpointStore(folder / str(number), context, keep=1, reshardable=True)
            source.save(2, policy)
            seen["again" if seen and name == names[0] else name] = _steps(policy, range(2, 5)), weights_of(policy)
    return seen


def _resharded(experts: Path, tied: Path, folder: Path) -> dict[str, Any]:
    return {
        "float32": _through_layouts(experts, folder / "float32", "float32", list(RESHARDED)),
        "bfloat16": _through_layouts(tied, folder / "bfloat16", "bfloat16", ["tp2_sp", "pp2_vp2", "dp2"]),
    }


@pytest.fixture(scope="module")
def resharded(folder: Path) -> dict[str, dict[str, tuple[Steps, dict[str, np.ndarray]]]]:
    experts, tied = make_checkpoint("qwen3_moe", folder / "experts"), make_checkpoint("llama_tied", folder / "tied")
    return run_ranks(2, _resharded, experts, tied, folder, timeout=240.0)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[Path, Path]:
    return make_checkpoint("llama", folder), make_checkpoint("llama_tied", folder)


@pytest.fixture(scope="module")
def two(folder: Path, models) -> list[dict[str, Any]]:
    return run_ranks(2, _two_ranks, models[0], make_checkpoint("qwen3_moe", folder), folder, timeout=240.0)


@pytest.fixture(scope="module")
def one(folder: Path, models, two) -> list[dict[str, Any]]:
    return run_ranks(1, _one_rank, *models, folder, timeout=240.0)


@pytest.fixture(scope="module")
def seen(one, two):
    """Return a function from the name of a layout to the results of its ranks."""
    return lambda name: [rank[name] for rank in (one if LAYOUTS[name][0] == 1 else two)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_takes_the_same_steps(layout: str, seen) -> None:
    for rank in seen(layout):
        going_on, resumed = rank["metrics"]
        assert resumed == going_on  # losses, gradient norms, learning rates: bit for bit
        assert rank["weights"][0] == rank["weights"][1]
    assert len({metrics["train/grad_norm"] for metrics in going_on}) == 3
    assert len({metrics["train/lr"] for metrics in going_on}) == 3
    assert len({rank["weights"][0] for rank in seen(layout)}) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_newest_checkpoint_is_found(layout: str, seen) -> None:
    for rank in seen(layout):
        assert rank["none_yet"] is None
        assert rank["found"] == (True, "step_00000002")
        assert rank["step"] == 2


def test_a_layout_is_kept_but_for_its_replicas(one, two) -> None:
    metrics, weights = one[0]["fewer replicas"]
    expected = two[0]["dp2"]
    for mine, theirs in zip(metrics, expected["metrics"][0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    for name, value in weights.items():
        np.testing.assert_allclose(value, expected["end"][name], atol=2e-4, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_lost_on_the_way_through_other_layouts(dtype: str, resharded) -> None:
    first = next(iter(RESHARDED))
    (went_on, end), (resumed, again) = resharded[dtype][first], resharded[dtype]["again"]
    assert resumed == went_on  # bit for bit
    assert digest(again) == digest(end)


@pytest.mark.parametrize("layout", list(RESHARDED)[1:])
def test_a_reshardable_checkpoint_goes_on_at_another_layout(layout: str, resharded) -> None:
    (metrics, weights), (expected, end) = resharded["float32"][layout], resharded["float32"][next(iter(RESHARDED))]
    for mine, theirs in zip(metrics, expected, strict=True):
        for key in ("train/surrogate_loss", "distill/divergence", "train/grad_norm", "train/lr"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4), key
    for name, value in weights.items():
        np.testing.assert_allclose(value, end[name], atol=2e-4, err_msg=name)


def test_a_teacher_that_follows_keeps_its_layout(resharded, folder: Path, tmp_path: Path) -> None:
    """Each rank wrote its shard of the teacher, which cannot be read at another layout."""
    shutil.copytree(folder / "float32" / "0" / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "step_00000002"
    state = json.loads((path / "run_state.json").read_text())
    architecture = read_architecture(folder / "experts" / "qwen3_moe")
    store = CheckpointStore(tmp_path, SimpleNamespace(layout=ParallelConfig(pipeline=2)), keep=1)
    assert store.check(path, architecture, "float32", "torch").step == 2
    (path / "run_state.json").write_text(json.dumps(state | {"memory": {"teacher": {"weights": True}}}))
    with pytest.raises(CheckpointError, match=r"its teacher cannot change its layout.* or resume at the old layout"):
        store.check(path, architecture, "float32", "torch")


@pytest.mark.parametrize("written", ["torch", "transformer_engine", None])
def test_the_optimizer_state_of_other_layers_is_refused(written: str | None, folder: Path, one, tmp_path: Path) -> None:
    """It is in the order of the parameters, and Megatron would load it for other ones. None: an older version's."""
    shutil.copytree(folder / "one_rank" / "checkpoints" / "step_00000002", tmp_path / "step_00000002")
    path = tmp_path / "step_00000002"
    state = json.loads((path / "run_state.json").read_text())
    assert state["spec"] == "torch"
    del state["spec"]
    (path / "run_state.json").write_text(json.dumps(state | ({} if written is None else {"spec": written})))
    store = CheckpointStore(tmp_path, SimpleNamespace(layout=ParallelConfig()), keep=1)
    same, other = (
        ("transformer_engine", "torch") if written == "transformer_engine" else ("torch", "transformer_engine")
    )
    architecture = read_architecture(folder / "llama")
    assert store.check(path, architecture, "float32", same).step == 2
    with pytest.raises(CheckpointError, match=f"was written with model.spec={same}, this run has {other}: .* or write"):
        store.check(path, architecture, "float32", other)
    (path / "run_state.json").write_text(json.dumps(state | {"spec": same, "reshardable": True}))
    assert store.check(path, architecture, "float32", other).step == 2
    followed = {"memory": {"teacher": {"weights": True}}, "reshardable": True}
    (path / "run_state.json").write_text(json.dumps(state | {"spec": same} | followed))
    with pytest.raises(CheckpointError, match=r"its teacher cannot change layers.* or resume with the same layers"):
        store.check(path, architecture, "float32", other)


@pytest.mark.parametrize(
    ("layout", "now"),
    [("pp2", "tensor=1, pipeline=2"), ("dp2", "tensor=1"), ("pp2_vp2", "tensor=1, pipeline=2, virtual_stages=2")],
)
def test_another_layout_is_refused_before_anything_is_read(layout: str, now: str, seen) -> None:
    for rank in seen(layout):
        there = ", ".join(
            f"{key}={size}"
            for key, size in {"tensor": 2, "pipeline": 1, "virtual_stages": 1}.items()
            if f"{key}=" in now
        )
        assert f"was written at {there} (parallel section), this run has {now}:" in rank["refused"]
        assert "or write a checkpoint with checkpoint.reshardable=true there" in rank["refused"]
        assert rank["untouched"]


def test_another_model_is_refused(one) -> None:
    text = one[0]["weights only"]["other model"]
    assert "is of another model: tied is False there and True here; train into another output folder" in text


@pytest.mark.parametrize("ranks", [1, 2])
def test_older_checkpoints_go(ranks: int, one, two) -> None:
    for rank in one if ranks == 1 else two:
        assert rank["keep"] == [
            ["step_00000001"],
            ["step_00000001", "step_00000002"],
            ["step_00000002", "step_00000009"],
            ["step_00000009", "step_00000010"],
            ["step_00000010", "step_00000011"],
        ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_half_written_checkpoint_is_not_found(ranks: int, one, two) -> None:
    for rank in one if ranks == 1 else two:
        seen = rank["half-written"]
        assert seen["error"] == "no space left on device"
        assert seen["partial"]
        assert seen["found"] == ("step_00000001", "step_00000002")
        assert seen["loaded"]


def test_weights_of_a_teacher_lie_beside_the_checkpoints(one) -> None:
    seen = one[0]["weights only"]
    assert seen["has"] == (False, True)
    assert seen["moved"] and seen["read back"]
    assert seen["latest"] == "step_00000002"  # and `keep` has not removed the teacher
    missing = "reference is missing: a run with a frozen teacher or a KL penalty cannot be resumed without it"
    assert missing in seen["missing"]


@pytest.mark.parametrize("text", [None, "{", '{"step": 2}', '{"step": 2, "seed": 1}'])
def test_a_checkpoint_that_says_nothing_about_itself(text: str | None, folder: Path, one, tmp_path: Path) -> None:
    shutil.copytree(folder / "one_rank" / "checkpoints" / "step_00000002", tmp_path / "step_00000002")
    state = tmp_path / "step_00000002" / "run_state.json"
    assert json.loads(state.read_text())["step"] == 2
    state.unlink() if text is None else state.write_text(text)
    with pytest.raises(CheckpointError, match=r"run_state.json cannot be read .* to resume an older one"):
        read_state(tmp_path / "step_00000002")
