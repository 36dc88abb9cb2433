"""A function that is called again and again in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Ticker:
    """Caller of a function every `every_s` seconds, between `start` and `stop`."""

    def __init__(self, call: Callable[[], None], every_s: float) -> None:
        self._call, self._every_s = call, every_s
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to call the function, in a thread that does not keep the process alive."""
        self._stopped = threading.Event()
        threading.Thread(target=self._run, args=(self._stopped,), daemon=True, name="console-ticker").start()

    def stop(self) -> None:
        """Stop calling; a call that has begun may still end. Idempotent."""
        self._stopped.set()

    def _run(self, stopped: threading.Event) -> None:
        while not stopped.wait(self._every_s):
            self._call()
