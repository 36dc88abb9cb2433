"""A rank that stands still, at the begin of a phase: injected into the real `train` command."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LATE = 1
FOREVER_S = 600.0


def stand_still(kind: str) -> None:
    """spin: beats go on; stop: the process is frozen; kill: it ends; slow: it goes on after a while."""
    if kind == "spin":
        time.sleep(FOREVER_S)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def train_with_stall(recipe: str, phase: str, kind: str, process_s: float) -> None:
    """`train`; the late rank stands still when the phase begins. process_s: in place of the least minute."""
    from megatron_hdpo.cli import main
    from megatron_hdpo.model.policy import Policy
    from megatron_hdpo.parallel import context
    from megatron_hdpo.tracking.console import Console

    os.environ["TORCHELASTIC_ERROR_FILE"] += os.environ["RANK"]
    context.LEAST_PATIENCE_S = process_s  # type: ignore[misc]
    begin, step = Console.phase, Policy._optimizer_step

    @contextmanager
    def late(self: Console, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with begin(self, name, *args, **kwargs) as found:
            if name == phase:
                stand_still(kind)
            yield found

    def late_step(self: Policy) -> Any:
        stand_still(kind)
        return step(self)

    if os.environ["RANK"] == str(LATE):
        if phase == "optimizer":
            Policy._optimizer_step = late_step  # type: ignore[method-assign]
        else:
            Console.phase = late  # type: ignore[method-assign,assignment]
    main(["train", recipe])
