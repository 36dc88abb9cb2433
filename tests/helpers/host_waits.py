"""Waits of the host for a GPU, by the place in Python that waits; for processes on the null GPU."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

OURS, MEGATRON = "/megatron_hdpo/", "/megatron/core/"


@contextmanager
def host_waits() -> Iterator[Counter[str]]:
    """Count the waits within the block by place: the innermost line of this package or of Megatron.

    torch warns of operations that wait; explicit waits for the device, a stream or an event are counted apart.
    """
    places: Counter[str] = Counter()

    def noting(real: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any, **kwargs: Any) -> Any:
            if place := _place():
                places[place] += 1
            return real(*args, **kwargs)

        return wait

    def show(message: object, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message) and (place := _place()):
            places[place] += 1

    explicit = ((torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda.Event, "synchronize"))
    with ExitStack() as stack, warnings.catch_warnings():
        for owner, name in explicit:
            stack.enter_context(patch.object(owner, name, noting(getattr(owner, name))))
        warnings.simplefilter("always")
        stack.enter_context(patch.object(warnings, "showwarning", show))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _place() -> str:
    """The file and line that waits; empty for what only the null GPU reads, to answer for kernels."""
    for frame in reversed(traceback.extract_stack()):
        if "/_rehearsal/host_values" in frame.filename:
            return ""
        for root, name in ((OURS, "megatron_hdpo/"), (MEGATRON, "megatron/core/")):
            if root in frame.filename:
                return f"{name}{frame.filename.split(root)[-1]}:{frame.lineno}"
    return "elsewhere"
