"""Manifest of a checkpoint: size and checksum of each of its files, written last. Needs no torch.

A file that a disk or a copy has damaged would be loaded without a word: torch's reader checks nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from megatron_hdpo.types.disk import to_disk

MANIFEST = "manifest.json"
SMALL_BYTES = 64 << 20
"""A fast verification reads files up to this size, which hold all descriptions; of others it asks the size only."""
_THREADS = 4
"""Files read at a time: hashing takes a core each."""
_OF_RANK = re.compile(r"__(\d+)_\d+\.distcp")


class Entry(TypedDict):
    """Description of a file. blake2b: hexadecimal digest of its contents."""

    bytes: int
    blake2b: str


def files_in(folder: Path) -> list[str]:
    """Return the names of a checkpoint's files but the manifest, sorted. For one rank: a thousand would load a disk."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def share_of(names: Sequence[str], rank: int, ranks: int) -> list[str]:
    """Return the files that one of the ranks describes or verifies: those that it wrote, and a share of the others.

    Each file is one rank's. On a file system of several nodes, a rank's own files are in the memory of its node.
    """
    owners = {name: int(match[1]) for name in names if (match := _OF_RANK.fullmatch(name)) and int(match[1]) < ranks}
    others = [name for name in names if name not in owners]
    return [name for name, owner in owners.items() if owner == rank] + others[rank::ranks]


def described(folder: Path, names: Sequence[str]) -> dict[str, Entry]:
    """Return the entries of files, by name, once these files are on the disk."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _entry_on_disk(folder / name), names), strict=True))


def write_manifest(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Write the manifest; it and the folder's names are on the disk when this returns."""
    path = folder / MANIFEST
    with path.open("w") as file:
        json.dump({"files": entries}, file, indent=1)
    to_disk(path)
    to_disk(folder)


def has_manifest(folder: Path) -> bool:
    """Return whether a checkpoint can be verified; those of older versions cannot."""
    return (folder / MANIFEST).is_file()


def problems_of(folder: Path, full: bool, rank: int = 0, ranks: int = 1) -> list[str]:
    """Return what is wrong with a rank's share of a checkpoint's files, a line each; [] if nothing is.

    full: read every byte; otherwise the sizes of files above `SMALL_BYTES` only.
    """
    try:
        entries: dict[str, Entry] = json.loads((folder / MANIFEST).read_bytes())["files"]
        listed = {name: (int(entry["bytes"]), str(entry["blake2b"])) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST} cannot be read: {type(error).__name__}: {error}"]
    with ThreadPoolExecutor(_THREADS) as pool:
        mine = share_of(sorted(listed), rank, ranks)
        return list(filter(None, pool.map(lambda name: _problem(folder / name, *listed[name], full), mine)))


def _problem(path: Path, size: int, digest: str, full: bool) -> str:
    try:
        if (now := path.stat().st_size) != size:
            return f"{path.name} has {now} bytes, {size} were written"
        if (full or size <= SMALL_BYTES) and _entry(path)["blake2b"] != digest:
            return f"{path.name} has other contents than were written"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return ""


def _entry_on_disk(path: Path) -> Entry:
    to_disk(path)
    return _entry(path)


def _entry(path: Path) -> Entry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()
        return {"bytes": file.tell(), "blake2b": digest}
