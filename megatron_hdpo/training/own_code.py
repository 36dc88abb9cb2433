"""Code of the user's own in a run: the same on all ranks, saved in the run folder, and unchanged at a resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_hdpo.config.recipe import Recipe, RecipeError
from megatron_hdpo.config.references import references
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.types.plugins import LoadedReference


def check_same_code(recipe: Recipe, context: ParallelContext) -> dict[str, str]:
    """Return the sha256 of each file that the recipe refers to, by reference. Collective.

    Raises RecipeError on every rank when the files of a rank differ from those of rank 0.
    """
    own = {reference: loaded.sha256 for reference, loaded in references(recipe).items()}
    found = context.gather_objects(own)
    for rank, other in enumerate(found):
        if changed := changed_code(found[0], other):
            raise RecipeError(
                f"{', '.join(changed)}: the code of rank {rank} is not that of rank 0: give every node the same file"
            )
    return own


def changed_code(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the references in both whose files differ."""
    return [reference for reference, digest in now.items() if before.get(reference, digest) != digest]


def save_code(recipe: Recipe, folder: Path) -> list[Path]:
    """Copy the files that the recipe refers to into `folder`, as they were loaded; return the copies.

    A name that other content has already, of an earlier start or of a file in another folder, stays as it is: the copy
    then has the beginning of its sha256 in its name.
    """
    return [_copied(loaded, folder) for loaded in references(recipe).values() if loaded.file is not None]


def _copied(loaded: LoadedReference, folder: Path) -> Path:
    assert loaded.file is not None
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / loaded.file.name
    if copy.exists() and copy.read_bytes() != loaded.source:
        copy = folder / f"{loaded.file.stem}-{loaded.sha256[:8]}{loaded.file.suffix}"
    copy.write_bytes(loaded.source)
    return copy
