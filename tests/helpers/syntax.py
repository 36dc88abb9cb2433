"""Syntax trees of source files, in a process whose other threads may parse, too."""

from __future__ import annotations

import ast
from pathlib import Path


def syntax_tree(path: Path) -> ast.Module:
    """Return the tree of a file. Before Python 3.11.8 and 3.12.2, parses in two threads share a counter, and one of
    them may fail for no reason of its own (CPython issue 106905): it is tried again."""
    for _ in range(10):
        try:
            return ast.parse(path.read_text(encoding="utf-8"))
        except SystemError:
            continue
    raise AssertionError(f"{path} was not parsed in ten tries")
