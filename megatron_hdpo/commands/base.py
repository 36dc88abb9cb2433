"""What a command is, and the arguments that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    summary: one sentence in the imperative, shown in the list of commands and above the command's own help. add:
    adds its arguments to a parser. run: does the work; it may raise UserError.
    """

    name: str
    summary: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of commands that read a recipe: `recipe` and `overrides`."""
    parser.add_argument("recipe", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. train.steps=10")
