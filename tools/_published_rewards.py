r"""Reward functions that other projects publish, run from copies of their repositories that the user has.

Each takes a gold answer and an answer and returns its verdict, None where the function gives none. A response is what
its own prompts ask for: a box, and "Answer:" for DAPO. TRL gets the gold answer as a formula, in dollar signs.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

Judge = Callable[[str, str], bool | None]


def verl(repository: Path) -> Mapping[str, Judge]:
    """Return verl's functions for MATH and for DAPO's and AIME's problems. Raises ModuleNotFoundError."""
    math = _load(repository, "verl.utils.reward_score.math_reward")
    dapo = _load(repository, "verl.utils.reward_score.math_dapo")
    return {
        "verl, MATH": lambda gold, answer: math.compute_score(rf"\boxed{{{answer}}}", gold) == 1.0,
        "verl, DAPO": lambda gold, answer: dapo.compute_score(f"Answer: {answer}", gold)["acc"],
    }


def trl(repository: Path) -> Mapping[str, Judge]:
    """Return TRL's `accuracy_reward`. Raises ModuleNotFoundError."""
    module = _load(repository, "trl.rewards.accuracy_rewards")

    def judge(gold: str, answer: str) -> bool | None:
        completion = [{"role": "assistant", "content": rf"\boxed{{{answer}}}"}]
        (reward,) = module.accuracy_reward([completion], [f"${gold}$"])
        return None if reward is None else reward == 1.0

    return {"TRL": judge}


def quietly(judge: Judge, gold: str, answer: str) -> bool | None:
    """Return a verdict without what the function prints; an exception is none."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return judge(gold, answer)
        except Exception:  # of the function of another project
            return None


def _load(repository: Path, name: str) -> ModuleType:
    """Import one module of a repository without the packages around it, whose imports need much else."""
    parts = name.split(".")[:-1]
    for depth in range(1, len(parts) + 1):
        package = ModuleType(".".join(parts[:depth]))
        package.__path__ = [str(repository.joinpath(*parts[:depth]))]
        sys.modules[package.__name__] = package
    return importlib.import_module(name)
