"""`megatron_hdpo prepare`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hdpo.commands.base import Command, add_recipe

if TYPE_CHECKING:
    from megatron_hdpo.config import Recipe
    from megatron_hdpo.data.load import LoadedData

_DESCRIPTION = """\
Downloads what the recipe names on the Hugging Face hub, then reads and checks
every set of problems, and keeps the result: the next start reads it in seconds.

Run it where the network is, with the caches that the training nodes see:
  HF_HOME        models and data sets; HF_HUB_CACHE and HF_DATASETS_CACHE move
                 one of them. HF_TOKEN opens gated ones.
  data.cache_dir checked problems; by default ~/.cache/megatron_hdpo
Afterwards HF_HUB_OFFLINE=1 makes sure that nothing asks the network. After a
change of the recipe or of a file, run it again: it does only what is missing."""


def _prepare(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.config import check_sections, load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides, snapshots=False)
    check_sections(recipe)
    for line in _models(recipe):
        print(line, flush=True)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    for line in _problems(recipe):
        print(line, flush=True)
    print(f"\nprepared: HF_HUB_OFFLINE=1 megatron_hdpo train {arguments.recipe} needs no network")


def _models(recipe: Recipe) -> Iterator[str]:
    """Download the models of the hub; yield a line about each model."""
    from megatron_hdpo.config import RecipeError
    from megatron_hdpo.config.hub import HubModel, model_paths

    for key, path in model_paths(recipe).items():
        if (model := HubModel.named(path)) is not None:
            folder = model.download()
            files = [file for file in folder.rglob("*") if file.is_file()]
            yield f"{key}: {path}, revision {folder.name[:12]}: {len(files)} files, {_size(files)} in {folder}"
        elif Path(path).is_dir():
            yield f"{key}: {path} is a folder: nothing to download"
        else:
            raise RecipeError(f"{key}: {path} is neither a folder nor a name on the hub such as org/name")


def _problems(recipe: Recipe) -> Iterator[str]:
    """Load every set of problems, which caches it; yield lines about each, and about the caches."""
    from huggingface_hub.constants import HF_HOME

    from megatron_hdpo.data.cache import UNUSED_DAYS, entries
    from megatron_hdpo.data.load import problem_folder
    from megatron_hdpo.model.architecture import read_architecture
    from megatron_hdpo.training.load_data import load_data, load_warmup_data
    from megatron_hdpo.training.tokenizer import load_tokenizer

    tokenizer, vocab_size = load_tokenizer(recipe.model.path), read_architecture(recipe.model.path).vocab_size
    yield from _about(load_data(recipe, tokenizer, vocab_size=vocab_size))
    for key in ("plain", "privileged") if recipe.warmup.kind == "sft" else ():
        if tasks := getattr(recipe.warmup, key):
            yield f"warmup.{key}:"
            yield from _about(load_warmup_data(recipe, tasks, tokenizer, vocab_size=vocab_size))
    folder = problem_folder(recipe.data)
    cached = entries(folder)
    yield (
        f"checked problems: {len(cached)} files, {_size(cached)}; each is removed when unused for {UNUSED_DAYS} days, "
        f"all by: rm -r {folder}"
    )
    yield f"models and data sets of the hub: {HF_HOME}; `hf cache ls` lists them, `hf cache rm` removes one"


def _about(data: LoadedData) -> Iterator[str]:
    yield from data.report.lines()
    for task, origin in data.origins.items():
        yield f"{task}: {origin}" + (f" ({_size([origin.file])})" if origin.file is not None else "")


def _size(files: Sequence[Path]) -> str:
    total = sum(file.stat().st_size for file in files)
    return f"{total / 1e9:.2f} GB" if total >= 1e9 else f"{total / 1e6:.2f} MB"


COMMAND = Command(
    "prepare",
    "Download models and data sets and check all problems.",
    add_recipe,
    _prepare,
    description=_DESCRIPTION,
    examples=("my.yaml", "my.yaml model.path=Qwen/Qwen2.5-7B-Instruct"),
)
