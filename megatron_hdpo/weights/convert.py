"""Conversion of checkpoints between Hugging Face and Megatron folders, in both directions, at any layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from megatron.core.models.gpt import GPTModel

from megatron_hdpo.model.architecture import Architecture, read_architecture
from megatron_hdpo.model.build import build_model
from megatron_hdpo.model.config import DTYPES, ModelConfig
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.errors import WeightsError
from megatron_hdpo.weights.hf_files import DTYPES as FILE_DTYPES
from megatron_hdpo.weights.hf_files import HfWeights
from megatron_hdpo.weights.load import load_hf
from megatron_hdpo.weights.megatron_files import (
    DESCRIPTION,
    is_megatron_checkpoint,
    load_megatron,
    read_record,
    save_megatron,
    stored_dtype,
)
from megatron_hdpo.weights.save import save_hf

Format = Literal["huggingface", "megatron"]
DtypeName = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Checkpoint:
    """A recognised checkpoint folder. description: the folder with its config.json and tokenizer files."""

    path: Path
    format: Format
    architecture: Architecture
    description: Path


def inspect(path: str | Path, config: str | Path | None = None) -> Checkpoint:
    """Recognise a checkpoint folder.

    config: a Hugging Face folder with the model's config and tokenizer, for a Megatron checkpoint without them (one of
    a training run). Raises WeightsError on a folder of neither format, and when `config` is of another model.
    """
    path = Path(path)
    if is_megatron_checkpoint(path):
        description = Path(config) if config else path / DESCRIPTION
        architecture = read_record(path)
        if not (description / "config.json").is_file():
            raise WeightsError(f"{description} has no config.json: name the model's Hugging Face folder with --config")
        if read_architecture(description) != architecture:
            raise WeightsError(f"{description} is the config of another model than {path}")
        return Checkpoint(path, "megatron", architecture, description)
    if (path / "config.json").is_file():
        return Checkpoint(path, "huggingface", read_architecture(path), path)
    raise WeightsError(f"{path} is neither a Hugging Face folder (config.json) nor a complete Megatron checkpoint")


def open_model(checkpoint: Checkpoint, context: ParallelContext, dtype: DtypeName = "auto") -> GPTModel:
    """Build the checkpoint's model on the run's layout and load its weights.

    dtype: `auto` keeps the stored type, or the wider one if two are stored. Collective over all ranks. Raises
    WeightsError on weights that do not fit.
    """
    name = _stored_dtype_name(checkpoint) if dtype == "auto" else dtype
    config = ModelConfig(path=str(checkpoint.description), dtype=name)
    model = build_model(checkpoint.architecture, context, config)
    load = load_hf if checkpoint.format == "huggingface" else load_megatron
    load(model, checkpoint.architecture, context, checkpoint.path)
    return model


def convert(
    source: str | Path,
    out: str | Path,
    to: Format,
    context: ParallelContext,
    *,
    dtype: DtypeName = "auto",
    config: str | Path | None = None,
    overwrite: bool = False,
) -> Checkpoint:
    """Write checkpoint `source` as `out` in format `to`, through a model on the run's layout; return the source.

    Collective over all ranks; each holds its own shard of the model. Raises WeightsError on weights that do not fit
    and on a folder that cannot be written.
    """
    checkpoint = inspect(source, config)
    model = open_model(checkpoint, context, dtype)
    save = save_hf if to == "huggingface" else save_megatron
    save(model, checkpoint.architecture, context, checkpoint.description, Path(out), overwrite=overwrite)
    return checkpoint


def _stored_dtype_name(checkpoint: Checkpoint) -> str:
    if checkpoint.format == "megatron":
        stored = {stored_dtype(checkpoint.path)}
    else:
        with HfWeights(checkpoint.path) as weights:
            stored = {FILE_DTYPES[kind] for kind in map(weights.dtype, weights.names) if kind in FILE_DTYPES}
    names = {getattr(torch, name): name for name in DTYPES}
    foreign = stored - names.keys()
    if foreign or not stored:
        kinds = ", ".join(sorted(map(str, foreign))) or "no floating-point type"
        raise WeightsError(
            f"{checkpoint.path} stores {kinds}, which is not supported: choose --dtype {'|'.join(DTYPES)}"
        )
    return names[torch.float32 if torch.float32 in stored else stored.pop()]
