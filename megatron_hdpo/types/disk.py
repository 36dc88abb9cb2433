"""Files that a power cut must not take."""

from __future__ import annotations

import os
from pathlib import Path


def to_disk(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk.

    Without it, a power cut after a rename could leave a folder that only looks complete.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
