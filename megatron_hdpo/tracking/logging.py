"""One log file per rank; warnings of rank 0 also on the console."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path

from rich.logging import RichHandler

from megatron_hdpo.tracking.console import SHOWN, Console

PACKAGE = "megatron_hdpo"
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_MARK = "_megatron_hdpo_handler"


def configure_logging(output_dir: str | Path, rank: int, console: Console | None = None) -> Path:
    """Send this process's logging to `<output_dir>/logs/rank_00003.log` (appended) and return that path.

    The file gets INFO and above of everything, Python warnings included. The console (of rank 0 only; None: stderr)
    gets warnings of this package and errors of others. Libraries that are already imported lose their own handlers on
    the terminal, and transformers its progress bars. A further call replaces the previous setup. The first line of
    every start names rank, host and process.
    """
    path = Path(output_dir) / "logs" / f"rank_{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    reset_logging()
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    _install(root, _file_handler(path))
    if rank == 0:
        _install(root, _console_handler(console))
    _take_over_third_party()
    logging.captureWarnings(True)
    # Ranks move between hosts when a run is started again: every start says where its lines were written.
    logging.getLogger(__name__).info("rank %d on %s, process %d", rank, socket.gethostname(), os.getpid())
    return path


def reset_logging() -> None:
    """Remove the handlers that `configure_logging` installed and close its files."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if getattr(handler, _MARK, False):
            root.removeHandler(handler)
            handler.close()
    logging.captureWarnings(False)


def _install(root: logging.Logger, handler: logging.Handler) -> None:
    setattr(handler, _MARK, True)
    root.addHandler(handler)


def _file_handler(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter(_FORMAT))
    return handler


def _console_handler(console: Console | None) -> logging.Handler:
    # Through the same rich console as the bars: two writers to one terminal would tear them.
    rich = (Console(True, stream=sys.stderr) if console is None else console).rich
    handler = RichHandler(console=rich, show_path=False, markup=False, rich_tracebacks=False)
    handler.setLevel(logging.WARNING)
    handler.addFilter(_for_people)
    return handler


def _for_people(record: logging.LogRecord) -> bool:
    if getattr(record, SHOWN, False):
        return False
    if record.levelno >= logging.ERROR or _is_ours(record.name):
        return True
    # Python warnings all come from one logger; the file that they name tells whose they are.
    return record.name == "py.warnings" and f"/{PACKAGE}/" in record.getMessage().split(": ", 1)[0]


def _is_ours(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def _take_over_third_party() -> None:
    try:
        # It installs its own stderr handler at the first import, so it must be imported before that is taken away.
        import transformers.utils.logging as transformers_logging
    except ImportError:
        pass
    else:
        transformers_logging.disable_progress_bar()
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        to_terminal = [handler for handler in logger.handlers if _writes_to_terminal(handler)]
        for handler in to_terminal:
            logger.removeHandler(handler)
            logger.propagate = True


def _writes_to_terminal(handler: logging.Handler) -> bool:
    if not isinstance(handler, logging.StreamHandler) or isinstance(handler, logging.FileHandler):
        return False
    return handler.stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
