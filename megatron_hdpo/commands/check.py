"""`megatron_hdpo check`."""

from __future__ import annotations

import argparse
import os

from megatron_hdpo.commands.base import Command, add_recipe


def _check(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.config import check_recipe, check_sections, load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_sections(recipe)  # before the imports below, which take seconds: torch and Megatron
    from megatron_hdpo.config.check import resolved_device
    from megatron_hdpo.config.precision import begun_in, choose_precision, resolve
    from megatron_hdpo.data.load import load
    from megatron_hdpo.model.architecture import read_architecture
    from megatron_hdpo.training.run import load_tokenizer

    world_size = int(os.environ.get("WORLD_SIZE", recipe.parallel.least_ranks))
    architecture = read_architecture(recipe.model.path)
    choice = choose_precision(recipe, architecture, resolved_device(recipe.device), begun_in(recipe.output))
    recipe = resolve(recipe, choice.dtype)
    warnings = check_recipe(recipe, architecture, world_size)
    print(choice.line)
    for warning in [choice.warning, *warnings] if choice.warning else warnings:
        print(f"warning: {warning}")
    data = load(recipe.data, load_tokenizer(recipe.model.path))
    print("\n".join(data.report.lines()))
    example = data.train[0]
    print(f"\nfirst prompt ({example.id}):\n{data.prompts.render_student(example)}")
    print(f"\nfirst privileged prompt:\n{data.prompts.render_privileged(example)}")
    print("\nthe recipe is fine")


COMMAND = Command(
    "check",
    "Check the recipe, its data and its layout.",
    add_recipe,
    _check,
    description="""\
Loads the data and the tokenizer, but no weights; prints a first prompt. Without
torchrun, as many ranks are assumed as the layout needs.""",
    examples=("examples/digit_sums/hdpo.yaml", "my.yaml parallel.tensor=2"),
)
