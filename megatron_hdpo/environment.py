"""One-line messages about missing and broken packages, in place of tracebacks. Needs the standard library only."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType

from megatron_hdpo import __version__

PROJECT = "megatron-hdpo"
MAIN_PACKAGES = ("megatron-core", "torch", "transformers", "transformer-engine", "sglang")
REMEDY = "run `make quickstart`, then `source .venv/bin/activate`"
EXTRAS = {
    "reasoning_gym": "tasks",
    "datasets": "datasets",
    "matplotlib": "report",
    "tensorboard": "tensorboard",
    "wandb": "tracking",
    "mlflow": "tracking",
    "gguf": "quickstart",
    "accelerate": "quickstart",
}
"""The extra of setup.py that installs a module which not every run needs."""


def missing_package(error: BaseException) -> str | None:
    """Return one line about the package that an import did not find and the remedy; None for any other error."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    package = error.name.partition(".")[0]
    if package in ("megatron_hdpo", "__main__") or installed(package):
        return None  # the package is there, without the module that was asked for: a defect, which needs its traceback
    return absent(error.name)


def broken_package(error: BaseException) -> str | None:
    """Return one line about Transformer Engine if the error arose while it was imported; None for any other error.

    Megatron-Core imports it wherever it is installed, and expects no error but ImportError.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__"))
        if frame.f_code.co_name == "<module>" and module.partition(".")[0].startswith("transformer_engine"):
            return engine_does_not_load(error)
    return None


def engine_does_not_load(error: BaseException) -> str:
    """Return one line that says that Transformer Engine is incomplete, and the remedy."""
    first_line = str(error).strip().partition("\n")[0]
    return (
        f"Transformer Engine is installed but does not load ({type(error).__name__}: {first_line}); Megatron-Core "
        "cannot be imported beside it: complete it (transformer-engine[pytorch], for this torch and CUDA) or uninstall "
        "it"
    )


def installed(package: str) -> bool:
    """Return whether a top-level package can be found; imports nothing."""
    return importlib.util.find_spec(package) is not None


def absent(module: str) -> str:
    """Return one line that says that a module is not installed, and the remedy."""
    return f"{module} is not installed for {sys.executable}: {remedy(module.partition('.')[0])}"


def remedy(package: str) -> str:
    """Return the command that fixes a missing package: set up the environment, or install into it.

    pip takes the requirements of an extra from the project that is installed, wherever that came from.
    """
    if not project_is_installed():
        return REMEDY
    return f"pip install '{PROJECT}[{EXTRAS[package]}]'" if package in EXTRAS else f"pip install {package}"


def explain_missing_packages() -> None:
    """Print one line in place of the traceback when a missing or broken package ends a script; the exit code is 1."""
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        line = missing_package(error) or broken_package(error)
        if line is None:
            usual(kind, error, trace)
        else:
            print(line, file=sys.stderr)

    sys.excepthook = hook


def versions() -> Iterator[str]:
    """Yield one line for the project and for each of its main packages, without importing them."""
    yield f"megatron_hdpo {__version__}"
    for package in MAIN_PACKAGES:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{package} not installed"
    yield f"Python {sys.version.split()[0]}"


def project_is_installed() -> bool:
    """Return whether pip installed the project for this interpreter.

    Setting up the project leaves a folder megatron_hdpo.egg-info in the repository, which every Python started there
    finds; only a real installation has pip's own record of files.
    """
    return any(found.read_text("RECORD") for found in importlib.metadata.distributions(name=PROJECT))
