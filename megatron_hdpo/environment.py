"""What a command says when packages are missing: one line in place of a traceback. Needs the standard library only."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from types import TracebackType

PROJECT = "megatron-hdpo"
REMEDY = "run `make quickstart`, then `source .venv/bin/activate`"


def missing_package(error: BaseException) -> str | None:
    """Return one line about the package that an import did not find, and what to do; None for any other error."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    package = error.name.partition(".")[0]
    if package in ("megatron_hdpo", "__main__") or importlib.util.find_spec(package) is not None:
        return None  # the package is there, without the module that was asked for: a defect, which needs its traceback
    return f"{error.name} is not installed for {sys.executable}: {remedy(package)}"


def remedy(package: str) -> str:
    """Return what to do about a missing package: set the environment up where it is not in use, else install it."""
    return f"pip install {package}" if project_is_installed() else REMEDY


def explain_missing_packages() -> None:
    """Let an uncaught error of a script be one line where it is a missing package. The exit code stays 1."""
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        line = missing_package(error)
        if line is None:
            usual(kind, error, trace)
        else:
            print(line, file=sys.stderr)

    sys.excepthook = hook


def project_is_installed() -> bool:
    """Return whether pip installed the project for this interpreter.

    A setup leaves a folder megatron_hdpo.egg-info in the repository, which every Python that is started there finds;
    pip's own record of the files is in a real installation only.
    """
    return any(found.read_text("RECORD") for found in importlib.metadata.distributions(name=PROJECT))
