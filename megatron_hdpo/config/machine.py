"""What this machine must have for a recipe: variables of torchrun, the run folder, its disk.

Looks, and changes nothing. Importing this module imports no torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_hdpo.config.recipe import Recipe, RecipeError

_GB = 1e9
_RANKS = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE"}
"""torchrun's variables: each rank counts from 0 to below a number of ranks."""


def check_ranks_of_torchrun(environment: Mapping[str, str]) -> None:
    """Raise RecipeError, with all reasons, when torchrun's variables cannot be what torchrun has set."""
    if errors := list(_rank_errors(environment)):
        raise RecipeError("\n".join(f"{error}; start ranks with torchrun, or unset it" for error in errors))


def folder_errors(recipe: Recipe) -> Iterator[str]:
    """Yield the reasons why a run could not write into its folder: permissions, and too little space on the disk."""
    folder = nearest(recipe.output)
    if not folder.is_dir():
        yield f"output: {folder} is a file: name a folder"
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        yield f"output: the folder {folder} cannot be written: Permission denied"
    free_gb, wanted = shutil.disk_usage(folder).free / _GB, recipe.health.min_free_disk_gb
    if recipe.health.enabled and free_gb < wanted:
        yield (
            f"output: {folder} has {free_gb:.1f} GB of free space, health.min_free_disk_gb is {wanted:g}: free some "
            "space, or use another folder"
        )


def nearest(path: Path) -> Path:
    """Return the path, or the innermost folder above it that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _rank_errors(environment: Mapping[str, str]) -> Iterator[str]:
    for rank, size in _RANKS.items():
        numbers = {}
        for name, least in ((size, 1), (rank, 0)):
            text = environment.get(name, str(least))
            if text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least:
                numbers[name] = int(text)
            else:
                yield f"the environment variable {name} is {text!r}, not a number from {least} on"
        if size in environment and len(numbers) == 2 and numbers[rank] >= numbers[size]:
            yield f"the environment variable {rank} is {numbers[rank]}, but {size} is {numbers[size]}"
    if "RANK" in environment:
        for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                yield f"the environment variable RANK is set without {name}"
    elif "WORLD_SIZE" in environment:
        yield "the environment variable WORLD_SIZE is set without RANK"
