"""What a command is, and the arguments that commands share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROGRAM = "megatron_hdpo"


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    summary: one sentence in the imperative, shown in the list of commands and above the command's own help.
    add: adds its arguments to a parser. run: does the work and returns the exit code, None for 0; it may raise
    UserError. description: what the summary leaves open, shown below it. examples: command lines without the program's
    name. interrupted: what is said after Ctrl-C.
    """

    name: str
    summary: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    description: str = ""
    examples: tuple[str, ...] = ()
    interrupted: str = "interrupted"

    @property
    def help(self) -> str:
        """Return the text above the arguments."""
        return f"{self.summary}\n\n{self.description}" if self.description else self.summary

    @property
    def epilog(self) -> str | None:
        """Return the text below the arguments; None without examples."""
        if not self.examples:
            return None
        return "examples:\n" + "\n".join(f"  {PROGRAM} {self.name} {example}".rstrip() for example in self.examples)


def write_out(text: str) -> None:
    """Print a long text; quiet when its reader, such as `head`, has seen enough."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        # What is left in the buffer is written at the end of the process, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_nothing(parser: argparse.ArgumentParser) -> None:
    """Add no argument."""


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of commands that read a recipe: `recipe` and `overrides`."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file of the recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="replace values of the recipe")
