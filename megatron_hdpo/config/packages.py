"""Packages that a recipe asks for beyond the core requirements: refused here where one is missing."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_hdpo.config.recipe import Recipe
from megatron_hdpo.environment import absent, installed


def package_errors(recipe: Recipe, elsewhere: bool = False) -> Iterator[str]:
    """Yield one line for each package that the recipe asks for and that is not installed, with its key.

    elsewhere: another machine will run the recipe, so only what the data needs counts: a check loads the data.
    """
    asked = _data_packages(recipe) if elsewhere else asked_packages(recipe)
    yield from (f"{key}: {absent(package)}" for key, package in asked if not installed(package))


def unknown_packages(recipe: Recipe) -> Iterator[str]:
    """Yield one line for each package that is not installed here and that the machine of the run may have."""
    for key, package in _tracking_packages(recipe):
        if not installed(package):
            yield f"{key}: the package {package} is not installed here"


def package_warnings(recipe: Recipe) -> Iterator[str]:
    """Yield one line when TensorBoard events are left out because the recipe leaves the choice to the environment."""
    if recipe.tracking.tensorboard is None and not installed("tensorboard"):
        yield f"tracking.tensorboard: no events are written: {absent('tensorboard')}, or set it to false"


def asked_packages(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (key, package) for each package that the recipe asks for."""
    yield from _data_packages(recipe)
    yield from _tracking_packages(recipe)


def _data_packages(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for part, tasks in (("train", recipe.data.train), ("evaluation", recipe.data.evaluation)):
        for index, task in enumerate(tasks):
            yield from ((f"data.{part}.{index}.kind={task.kind}", package) for package in task.packages)


def _tracking_packages(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield from ((f"tracking.{package}", package) for package in recipe.tracking.packages)
