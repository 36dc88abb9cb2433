"""`megatron_hdpo verify-checkpoint`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_hdpo.commands.base import Command
from megatron_hdpo.types.errors import UserError

_DESCRIPTION = """\
Compares every file with the checksums in the checkpoint's manifest, which was
written last. Exit code 1 when a checkpoint is damaged. A run does the same
before it resumes (`checkpoint.verify`)."""


UNFINISHED = (".partial", ".removed")
"""Endings of folders that are being written or removed."""


class NoCheckpointError(UserError, FileNotFoundError):
    """A folder that holds no checkpoint."""


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="run folder, or one of its checkpoints")
    parser.add_argument("--fast", action="store_true", help="sizes of files, and contents of small ones only")


def _verify(arguments: argparse.Namespace) -> int:
    from megatron_hdpo.checkpoint.manifest import has_manifest, problems_of

    damaged = False
    for path in _checkpoints(arguments.folder):
        if not has_manifest(path):
            print(f"{path.name}: cannot be verified, an older version wrote it without a manifest")
            continue
        problems = problems_of(path, not arguments.fast)
        damaged = damaged or bool(problems)
        print(f"{path.name}: " + ("damaged" if problems else "whole"))
        for problem in problems:
            print(f"  {problem}")
    return int(damaged)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a run folder, or the folder itself if it is one."""
    if any((folder / name).is_file() for name in ("manifest.json", "metadata.json")):
        return [folder]
    inside = folder / "checkpoints"
    found = [p for p in inside.iterdir() if p.is_dir() and p.suffix not in UNFINISHED] if inside.is_dir() else []
    if not found:
        raise NoCheckpointError(f"{folder} holds no checkpoint: name a run folder, or a folder in its checkpoints/")
    return sorted(found)


COMMAND = Command(
    "verify-checkpoint",
    "Verify that checkpoints are as they were written.",
    _add,
    _verify,
    description=_DESCRIPTION,
    examples=("runs/digit-sums", "runs/digit-sums/checkpoints/step_00000050 --fast"),
)
