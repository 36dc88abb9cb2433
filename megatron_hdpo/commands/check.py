"""`megatron_hdpo check`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_hdpo.commands.base import Command, add_recipe
from megatron_hdpo.commands.numbers import integer

if TYPE_CHECKING:
    from megatron_hdpo.config import Recipe
    from megatron_hdpo.model.architecture import Architecture

_DESCRIPTION = """\
Loads the data and the tokenizer, and of the weights only their names and
shapes; looks at run folder, disk and SGLang; prints a first prompt. Without
torchrun and --ranks, as many ranks are assumed as the layout needs at least.
A recipe for GPUs can be checked on a machine without them: with --for gpu,
device=auto means cuda, and what this machine cannot tell is listed."""
_DEVICES = {"gpu": "cuda", "cpu": "cpu"}


def _add(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--for",
        dest="machine",
        choices=["here", "cpu", "gpu"],
        default="here",
        help="machine that will run the recipe (default here)",
    )
    parser.add_argument("--ranks", type=integer(1), metavar="N", help="ranks that torchrun will start, on all nodes")


def _check(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.config import check_sections, load_recipe
    from megatron_hdpo.config.machine import check_ranks_of_torchrun

    if arguments.ranks is None:
        check_ranks_of_torchrun(os.environ)
    recipe = _for_machine(load_recipe(arguments.recipe, arguments.overrides), arguments.machine)
    # Before the imports below, which take seconds: torch and Megatron.
    check_sections(recipe, elsewhere=arguments.machine != "here")
    from megatron_hdpo.checkpoint.store import latest_checkpoint, read_state
    from megatron_hdpo.model.architecture import read_architecture
    from megatron_hdpo.training.load_data import check_enough, check_replay, load_data
    from megatron_hdpo.training.tokenizer import check_tokens, load_tokenizer, stop_token_ids

    recipe, lines = _checked(recipe, arguments)
    print("\n".join(lines))
    path, tokenizer = recipe.model.path, load_tokenizer(recipe.model.path)
    vocab_size = read_architecture(path).vocab_size
    for warning in check_tokens(tokenizer, stop_token_ids(tokenizer, path), vocab_size, path):
        print(f"warning: {warning}")
    data = load_data(recipe, tokenizer, vocab_size=vocab_size)
    check_enough(recipe, data)
    latest = latest_checkpoint(recipe.output)
    check_replay(recipe, 0 if latest is None else read_state(latest).step)
    print("\n".join(data.report.lines()))
    example = data.train[0]
    print(f"\nfirst prompt ({example.id}):\n{data.prompts.render_student(example)}")
    print(f"\nfirst privileged prompt:\n{data.prompts.render_privileged(example)}\n")
    if arguments.machine != "here":
        for line in _unknown_here(recipe, False):
            print(f"not checked: {line}")
    print("the recipe is fine")


def _for_machine(recipe: Recipe, machine: str) -> Recipe:
    """Return the recipe with device=auto replaced by the device of the machine that will run it."""
    from megatron_hdpo.config import RecipeError

    wanted = _DEVICES.get(machine)
    if wanted is None or recipe.device == wanted:
        return recipe
    if recipe.device != "auto":
        raise RecipeError(
            f"device: {recipe.device}, so --for {machine} does not apply: leave it out, or set device=auto"
        )
    return recipe.model_copy(update={"device": wanted})


def _checked(recipe: Recipe, arguments: argparse.Namespace) -> tuple[Recipe, list[str]]:
    """Return the recipe with its precision, and what there is to say of it. Raises RecipeError when it cannot run."""
    from megatron_hdpo.config import RecipeError, check_recipe
    from megatron_hdpo.config.check import resolved_device
    from megatron_hdpo.config.precision import begun_in, choose_precision, resolve
    from megatron_hdpo.model.architecture import read_architecture

    device, here = resolved_device(recipe.device), arguments.machine == "here"
    ranks = arguments.ranks or int(os.environ.get("WORLD_SIZE", recipe.parallel.least_ranks))
    architecture = read_architecture(recipe.model.path)
    choice = choose_precision(recipe, architecture, device, begun_in(recipe.output))
    try:
        resolved = resolve(recipe, choice.dtype)
        warnings = check_recipe(resolved, architecture, ranks, elsewhere=not here)
        if here and _has_device(device):
            _check_machine(resolved, architecture, device)
    except RecipeError as error:
        if here and recipe.device == "auto" and device == "cpu":
            raise RecipeError(f"{error}\n(this machine has no GPU; for a run on one: check --for gpu)") from error
        raise
    if choice.warning:
        warnings.insert(0, choice.warning)
    if here:
        warnings += [f"{line}; for a run on another machine: check --for gpu" for line in _unknown_here(resolved, True)]
    return resolved, [choice.line, *(f"warning: {warning}" for warning in warnings), f"ranks: {ranks}"]


def _check_machine(recipe: Recipe, architecture: Architecture, device: str) -> None:
    """Raise the UserError of the first thing on this machine that a run would stop at: folder, servers, weights."""
    from megatron_hdpo.config import RecipeError
    from megatron_hdpo.config.hub import model_paths
    from megatron_hdpo.config.machine import folder_errors
    from megatron_hdpo.model.architecture import read_architecture
    from megatron_hdpo.rewards.pool import RewardPool
    from megatron_hdpo.weights.load import check_weights

    if errors := list(folder_errors(recipe)):
        raise RecipeError("\n".join(errors))
    if _starts_servers(recipe):
        try:
            recipe.rollout.sglang.servers.check_interpreter(device)
        except ValueError as error:
            raise RecipeError(f"rollout.sglang.servers: {error}") from error
    if recipe.rollout.replay is None:
        with RewardPool(recipe.data.tasks, recipe.reward) as rewards:
            rewards.check()
    for path in model_paths(recipe).values():
        check_weights(architecture if path == recipe.model.path else read_architecture(path), path)


def _starts_servers(recipe: Recipe) -> bool:
    rollout = recipe.rollout
    return rollout.engine == "sglang" and rollout.sglang.placement != "given" and rollout.replay is None


def _has_device(device: str) -> bool:
    import torch

    return device == "cpu" or torch.cuda.is_available()


def _unknown_here(recipe: Recipe, here: bool) -> Iterator[str]:
    """Yield what this machine lacks for the recipe, so that it could not be checked."""
    from megatron_hdpo.config.check import resolved_device
    from megatron_hdpo.config.packages import unknown_packages
    from megatron_hdpo.model.config import transformer_engine_available
    from megatron_hdpo.rewards.functions import HttpService

    device, sglang = resolved_device(recipe.device), recipe.rollout.sglang
    if not _has_device(device):
        yield "device=cuda: this machine has no GPU"
    if not here or not _has_device(device):
        yield "model.path and output: the weights, the run folder and its disk"
    if device == "cuda" and recipe.model.spec != "torch" and not transformer_engine_available():
        yield f"model.spec={recipe.model.spec}: Transformer Engine is not installed here"
    if _starts_servers(recipe):
        try:
            sglang.servers.check_interpreter(device)
        except ValueError as error:
            yield f"rollout.sglang.servers: {error}"
    if not here and any(isinstance(function, HttpService) for function in recipe.reward.functions or ()):
        yield "reward.functions: whether that machine reaches the services"
    yield from unknown_packages(recipe)


COMMAND = Command(
    "check",
    "Check the recipe, its data and its layout.",
    _add,
    _check,
    description=_DESCRIPTION,
    examples=("examples/digit_sums/hdpo.yaml", "my.yaml parallel.tensor=2", "my.yaml --for gpu --ranks 16"),
)
