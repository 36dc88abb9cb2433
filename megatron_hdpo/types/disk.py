"""Files that a power cut must not take, and that have the permissions that their user wants."""

from __future__ import annotations

import os
import stat
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


def give_user_mode(path: Path) -> None:
    """Give a file the permissions of any new file of this user; safetensors leaves its files to their owner alone."""
    probe = path.with_name(f".{path.name}.mode")  # asking for the umask would change it, for all threads
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    path.chmod(mode)
