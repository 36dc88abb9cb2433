"""Where the main thread is: the line of code that it runs, and whether it waits there for other ranks."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_COLLECTIVES = "/torch/distributed/"


def main_thread_stack() -> traceback.StackSummary:
    """Return the call stack of the main thread, the innermost call last; it may be called in any thread."""
    return traceback.extract_stack(sys._current_frames()[_ident()])


def waits_for_ranks(stack: traceback.StackSummary) -> bool:
    """Return whether a stack ends in a collective or in the wait for one.

    Waits of a collective's handle are C++ functions: they are on the line of their caller. Python's own waits, of
    events, queues and processes, end in a file of the standard library. On NCCL a rank rarely waits here: its GPU does.
    """
    innermost = stack[-1]
    return _COLLECTIVES in innermost.filename or ".wait(" in (innermost.line or "")


def place(stack: traceback.StackSummary) -> str:
    """Return `megatron_hdpo/model/policy.py:205 in update`: the innermost call of this package, else of all."""
    own = [frame for frame in stack if _PACKAGE in Path(frame.filename).parents]
    frame = own[-1] if own else stack[-1]
    path = Path(frame.filename)
    name = path.relative_to(_PACKAGE.parent) if own else path.name
    return f"{name}:{frame.lineno} in {frame.name}"


def _ident() -> int:
    ident = threading.main_thread().ident
    assert ident is not None, "the main thread has started"
    return ident
