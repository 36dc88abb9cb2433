"""Run Python in processes of its own, for a limited time, and read what it prints while it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path


class PartError(RuntimeError):
    """A process that failed or ran out of time; the message has the end of its output."""


def run_python(arguments: Sequence[str], root: Path, seconds: float, on_line: Callable[[str], None]) -> None:
    """Run Python with these arguments in the folder `root`; hand over each line of its output as it comes.

    The process and its children are killed after `seconds`. Raises PartError when it fails or is killed.
    """
    environment = os.environ | {
        "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "PYTHONUNBUFFERED": "1",
    }
    last: list[str] = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        timed_out = threading.Event()

        def kill() -> None:
            timed_out.set()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                last = [*last[-20:], line]
                on_line(line)
            code = process.wait()
        finally:
            timer.cancel()
        if code:
            errors.seek(0)
            how = f"did not end within {seconds:.0f} s" if timed_out.is_set() else f"ended with {code}"
            raise PartError(f"{' '.join(arguments)} {how}:\n{(''.join(last) + errors.read())[-3000:]}")
