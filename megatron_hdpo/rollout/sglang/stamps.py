"""Stamp of the weights on a server: the run that sent them, and their version."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field

import numpy as np

UNVERSIONED = -1
"""Version of weights that this run did not send: those that a server was started with, or another run's."""
_FORM = re.compile(r"hdpo-(?P<run>[0-9a-f]{16})-(?P<version>[0-9]{1,9})")


@dataclass(frozen=True)
class RunStamp:
    """Stamps of one start of a run.

    run: 16 hexadecimal digits, drawn anew at each start. A step number alone would let a run take the weights of
    another one, or of an earlier start of its own that is still alive, for the weights that it sent.
    """

    run: str = field(default_factory=lambda: secrets.token_hex(8))

    def of(self, version: int) -> str:
        """Return the stamp of the weights of a version (a step, 0 or larger)."""
        return f"hdpo-{self.run}-{version}"

    def version(self, stamp: object) -> int:
        """Return the version of a stamp of this run, and UNVERSIONED for any other one."""
        found = _FORM.fullmatch(str(stamp))
        return int(found["version"]) if found and found["run"] == self.run else UNVERSIONED


def problem_with_versions(versions: np.ndarray, wanted: int, newest: int) -> str:
    """Return what is wrong with the versions of a sample's tokens, or an empty string.

    versions: int32 [T]. wanted: version of the weights when the sample was requested. newest: version that was sent
    last; a sample may go on with it.
    """
    if versions.min() == UNVERSIONED:
        return "it was sampled with weights that are not this run's"
    if versions.min() < wanted or versions.max() > newest:
        found = ", ".join(map(str, sorted(set(versions.tolist()))))
        until = f" to {newest}" if newest > wanted else ""
        return f"it was sampled with weights of version {found}, not {wanted}{until}"
    return ""


def is_of_a_run(stamp: object) -> bool:
    """Return whether a run of this package has sent the weights with this stamp."""
    return _FORM.fullmatch(str(stamp)) is not None
