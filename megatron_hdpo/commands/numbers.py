"""Numbers on a command line, refused by the parser where no command can mean them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

LARGEST = 2**31 - 1


def integer(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """Return a type of argparse for integers from `least` to `most`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be an integer from {least} to {most}, not {text[:40]!r}")
        return value

    return read


def real(least: float, most: float) -> Callable[[str], float]:
    """Return a type of argparse for finite numbers from `least` to `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be a number from {least:g} to {most:g}, not {text[:40]!r}")
        return value

    return read
