"""Damage to a checkpoint's files is found, named, and never loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import run_command
from distributed_helper import run_ranks
from tiny_policy import OPTIMIZER, SPEC, build_policy, joined, make_checkpoint, make_examples, weights_of

from megatron_hdpo.checkpoint.manifest import MANIFEST, described, files_in, problems_of, share_of, write_manifest
from megatron_hdpo.checkpoint.store import CheckpointError, CheckpointStore

NAMES = ("__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt", "run_state.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files as a checkpoint of two ranks has them, with a manifest."""
    for number, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(bytes(range(number, number + 100)) * 3)
    write_manifest(tmp_path, described(tmp_path, files_in(tmp_path)))
    return tmp_path


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_file_is_one_ranks(ranks: int, folder: Path) -> None:
    shares = [share_of(files_in(folder), rank, ranks) for rank in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted(NAMES)
    assert ranks == 1 or "__1_0.distcp" in shares[1]
    assert all(not problems_of(folder, True, rank, ranks) for rank in range(ranks))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip, "other contents"),
    "cut": (lambda path: os.truncate(path, 7), "has 7 bytes"),
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes"),
    "missing": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_damage_is_named(ranks: int, name: str, damage: str, folder: Path) -> None:
    change, what = DAMAGES[damage]
    change(folder / name)
    (line,) = [line for rank in range(ranks) for line in problems_of(folder, True, rank, ranks)]
    assert line.startswith(name) and what in line


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"files": {"a": 1}}', '{"files": {"a": {"bytes": "x", "blake2b": 1}}}']
)
def test_a_manifest_that_is_none(text: str, folder: Path) -> None:
    (folder / MANIFEST).write_text(text)
    assert problems_of(folder, True)[0].startswith("manifest.json cannot be read")


def test_a_fast_verification_reads_small_files_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_hdpo.checkpoint.manifest.SMALL_BYTES", 10)
    flip(folder / NAMES[0])
    assert not problems_of(folder, full=False) and problems_of(folder, full=True)
    os.truncate(folder / NAMES[0], 20)
    assert problems_of(folder, full=False)


def save_three(model: Path, run: Path) -> list[np.ndarray]:
    """Save a checkpoint after each of three updates; the weights after the second one."""
    with joined() as context:
        policy = build_policy(model, context, optimizer=OPTIMIZER)
        store, weights = CheckpointStore(run, context, keep=3), {}
        for step in range(1, 4):
            policy.update(make_examples()[:3], SPEC)
            store.save(step, policy)
            if step == 2:
                weights = weights_of(policy)
        return [np.asarray(weights[name]) for name in sorted(weights)]


def resume(model: Path, run: Path) -> tuple[list[str], str, list[np.ndarray]]:
    """Warnings, the checkpoint that is loaded or the error, and the weights then."""
    with joined() as context:
        policy = build_policy(model, context, optimizer=OPTIMIZER)
        store, warnings = CheckpointStore(run, context, keep=3), []
        try:
            store.set_damaged_aside(warnings.append)
        except CheckpointError as error:
            return warnings, str(error), []
        latest = store.latest()
        assert latest is not None
        store.load(latest, policy)
        weights = weights_of(policy)
        return warnings, latest.name, [np.asarray(weights[name]) for name in sorted(weights)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[np.ndarray]]:
    root = tmp_path_factory.mktemp("saved")
    model = make_checkpoint("qwen2", root / "model")
    return model, root / "run", run_ranks(1, save_three, model, root / "run")[0]


@pytest.fixture
def run(saved: tuple[Path, Path, list[np.ndarray]], tmp_path: Path) -> Path:
    """A copy of the saved run."""
    return Path(shutil.copytree(saved[1], tmp_path / "run"))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt", "run_state.json"])
@pytest.mark.fault(
    "a bit of the newest checkpoint has flipped",
    phase="resuming",
    seen="a warning that names the file; the folder becomes `step_....damaged`",
    lost="the steps since the checkpoint before",
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(
    name: str, saved: tuple[Path, Path, list[np.ndarray]], run: Path
) -> None:
    model, _, weights = saved
    flip(run / "checkpoints/step_00000003" / name)
    ((warnings, found, loaded),) = run_ranks(1, resume, model, run)
    assert found == "step_00000002" and (run / "checkpoints/step_00000003.damaged").is_dir()
    assert len(warnings) == 1 and name in warnings[0] and "step_00000003.damaged" in warnings[0]
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(loaded, weights, strict=True))


@pytest.mark.fault(
    "every checkpoint is damaged",
    phase="resuming",
    seen="an error, exit code 2: the run does not begin anew in its folder",
    lost="what the checkpoints held",
)
def test_a_run_without_a_whole_checkpoint_begins_nothing_anew(
    saved: tuple[Path, Path, list[np.ndarray]], run: Path
) -> None:
    model = saved[0]
    for step in (1, 2, 3):
        (run / f"checkpoints/step_0000000{step}/.metadata").unlink()
    for started in range(2):
        ((warnings, error, _),) = run_ranks(1, resume, model, run)
        assert "are damaged" in error and len(warnings) == (0 if started else 3)


def test_a_checkpoint_of_an_older_version_is_taken_with_a_warning(
    saved: tuple[Path, Path, list[np.ndarray]], run: Path
) -> None:
    model = saved[0]
    (run / "checkpoints/step_00000003/manifest.json").unlink()
    ((warnings, found, _),) = run_ranks(1, resume, model, run)
    assert found == "step_00000003" and "has no manifest.json" in warnings[0]


def test_the_command(run: Path, tmp_path: Path) -> None:
    flip(run / "checkpoints/step_00000002/__0_0.distcp")
    (run / "checkpoints/step_00000001/manifest.json").unlink()
    ended = run_command("verify-checkpoint", run)
    assert ended.codes == [1]
    assert ended.stdout[0].splitlines() == [
        "step_00000001: cannot be verified, an older version wrote it without a manifest",
        "step_00000002: damaged",
        "  __0_0.distcp has other contents than were written",
        "step_00000003: whole",
    ]
    assert run_command("verify-checkpoint", run / "checkpoints/step_00000003", "--fast").codes == [0]
    (run / "checkpoints/step_00000002/metadata.json").unlink()
    ended = run_command("verify-checkpoint", run)
    assert ended.codes == [1] and "  metadata.json is missing" in ended.stdout[0].splitlines()
    nothing = run_command("verify-checkpoint", tmp_path)  # the folder above the run's
    assert nothing.codes == [2] and nothing.stderr[0].startswith("NoCheckpointError: ")
    manifest = json.loads((run / "checkpoints/step_00000003" / MANIFEST).read_text())
    assert "run_state.json" in manifest["files"] and len(manifest["files"]["common.pt"]["blake2b"]) == 128


def save_five(model: Path, run: Path) -> list[str]:
    with joined() as context:
        policy = build_policy(model, context, optimizer=OPTIMIZER)
        store = CheckpointStore(run, context, keep=1, keep_every=2)
        (run / "checkpoints/step_00000009.removed").mkdir(parents=True)  # of a removal that was cut off
        for step in range(1, 6):
            store.save(step, policy)
        return sorted(path.name for path in store.root.iterdir())


@pytest.mark.fault(
    "the removal of an old checkpoint was cut off",
    phase="saving",
    seen="nothing: what is left does not count as a checkpoint",
    lost="nothing",
)
def test_old_checkpoints_are_removed_but_for_every_second(
    saved: tuple[Path, Path, list[np.ndarray]], tmp_path: Path
) -> None:
    (names,) = run_ranks(1, save_five, saved[0], tmp_path / "run")
    assert names == ["step_00000002", "step_00000004", "step_00000005"]


def resume_where_rank_1_wrote_damage(model: Path, run: Path) -> tuple[list[str], str]:
    """Save two steps on two stages, flip a bit in a file of rank 1, and resume; warnings and what is taken."""
    with joined(pipeline=2) as context:
        policy = build_policy(model, context, optimizer=OPTIMIZER)
        store, warnings = CheckpointStore(run, context, keep=2), []
        for step in (1, 2):
            path = store.save(step, policy)
        if context.is_leader:
            flip(path / "__1_0.distcp")
        context.barrier("damaged")
        store.set_damaged_aside(warnings.append)
        latest = store.latest()
        assert latest is not None
        store.load(latest, policy)
        return warnings, latest.name


@pytest.mark.fault(
    "a bit has flipped in a file that only one rank of two reads",
    phase="resuming",
    seen="a warning that names the file; both ranks take the checkpoint before",
    lost="the steps since the checkpoint before",
)
def test_all_ranks_take_the_checkpoint_before_one_that_is_damaged_on_one(
    saved: tuple[Path, Path, list[np.ndarray]], tmp_path: Path
) -> None:
    """Each rank verifies its own files."""
    first, second = run_ranks(2, resume_where_rank_1_wrote_damage, saved[0], tmp_path / "run")
    assert first == second and first[1] == "step_00000001"
    assert len(first[0]) == 1 and "__1_0.distcp has other contents" in first[0][0]
