"""Files and commands that a document gives its reader, taken from it letter by letter."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]


def files_of(document: str) -> dict[str, str]:
    """The files of docs/`document` by name: code blocks after a paragraph that ends in `name`: ."""
    text = (ROOT / "docs" / document).read_text()
    return {name: code for name, code in re.findall(r"`([\w.-]+/[\w.-]+)`:\n\n```\w+\n(.*?)```", text, re.DOTALL)}


def commands_on(document: str, word: str) -> list[list[str]]:
    """The arguments of the indented commands of docs/`document` around `word`: the block that names it first."""
    text = (ROOT / "docs" / document).read_text()
    blocks = re.findall(r"(?:^ {4}\S.*\n)+", text, re.MULTILINE)
    block = next(block for block in blocks if word in block)
    return [shlex.split(line)[3:] for line in block.splitlines()]  # after python -m megatron_hdpo
