"""Limits while templates are tried: a template is a program, and may count for hours or fill the memory."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import jinja2

MOST_CHARACTERS = 100_000
"""Characters that a prompt for a question of a few words may have."""
_SECONDS = 5.0
_BYTES = 1 << 30


class TrialFailed(jinja2.TemplateRuntimeError):
    """A template that does too much; the message says what."""


def check_size(text: str) -> str:
    """Return what a template made of a question of a few words. Raises TrialFailed when it is far too long."""
    if len(text) > MOST_CHARACTERS:
        raise TrialFailed(f"it makes {len(text):,} characters of a question of a few words")
    return text


def check_powers(tree: jinja2.nodes.Template) -> None:
    """Raise TrialFailed for a template that computes powers: no prompt needs one, and no limit stops a huge one."""
    if (power := tree.find(jinja2.nodes.Pow)) is not None:
        raise TrialFailed(f"it computes a power (**) in its line {power.lineno}")


@contextmanager
def trial() -> Iterator[None]:
    """Limit the processor time, by TrialFailed, and on Linux the memory, by MemoryError, of what runs inside.

    Processor time is limited in the main thread only, because Python tells no other thread of signals.
    """
    with _limited_memory(), _limited_time():
        yield


@contextmanager
def _limited_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _too_slow)
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _too_slow(number: int, frame: FrameType | None) -> NoReturn:
    raise TrialFailed(f"it takes more than {_SECONDS:g} s of processor time")


@contextmanager
def _limited_memory() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + _BYTES
    if resource.RLIM_INFINITY != before[0] < limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
