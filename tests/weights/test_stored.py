"""A checkpoint from a stranger is refused before any of its code runs."""

from __future__ import annotations

import collections
import io
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import run_ranks
from tiny_policy import OPTIMIZER, build_policy, joined, make_checkpoint

from megatron_hdpo.checkpoint.store import CheckpointError, CheckpointStore
from megatron_hdpo.weights.megatron_files import load_megatron, save_megatron
from megatron_hdpo.weights.stored import UnsafeFileError, check_metadata


class Calls:
    """Unpickling this calls a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def marks(folder: Path) -> Calls:
    """Code that leaves a file behind when it runs."""
    return Calls(os.mkdir, str(folder / "code-has-run"))


HOSTILE = {
    "a function": lambda folder: pickle.dumps(marks(folder)),
    "eval": lambda folder: pickle.dumps(Calls(eval, f"__import__('os').mkdir({str(folder / 'code-has-run')!r})")),
    # A function of an allowed module that belongs to another one, and attributes of an allowed class.
    "imported": lambda folder: b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x05field\x93)R.",
    "dotted": lambda folder: b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x11Metadata.__init__\x93)R.",
    "of torch": lambda folder: pickle.dumps(Calls(torch.load, str(folder / "other"))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_no_description_needs_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(HOSTILE[name](tmp_path))
    with pytest.raises(UnsafeFileError, match=r"\.metadata refers to .* could run code: it is not read"):
        check_metadata(tmp_path)
    assert not (tmp_path / "code-has-run").exists()


def test_plain_data_is_no_code(tmp_path: Path) -> None:
    data = {"size": torch.Size([2]), "type": torch.bfloat16, "map": collections.OrderedDict(a=1)}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(data))
    check_metadata(tmp_path)


def read_hostile(folder: Path) -> dict[str, str]:
    """Save a model's checkpoint and its weights, put code into them in two ways, and read them; the errors."""
    errors = {}
    with joined() as context:
        path = make_checkpoint("qwen2", folder / "model")
        policy = build_policy(path, context, optimizer=OPTIMIZER)
        store = CheckpointStore(folder / "run", context, keep=2)
        saved = store.save(1, policy)
        save_megatron(policy.model, policy.architecture, context, path, folder / "megatron")
        whole = (saved / ".metadata").read_bytes()
        hostile = pickle.dumps(marks(folder))
        for name, where in {"training": saved, "weights": folder / "megatron"}.items():
            (where / ".metadata").write_bytes(hostile)
            try:
                if name == "training":
                    store.load(saved, policy)
                else:
                    load_megatron(policy.model, policy.architecture, context, where)
            except (UnsafeFileError, CheckpointError) as error:
                errors[name] = f"{type(error).__name__}: {error}"
        described = pickle.loads(whole)
        objects = [
            index
            for index in described.storage_data
            if type(described.state_dict_metadata[index.fqn]).__name__ == "BytesStorageMetadata"
        ]
        torch.save(marks(folder), buffer := io.BytesIO())
        for name, data in {"object": buffer.getvalue(), "bare pickle": hostile}.items():
            (saved / "object.distcp").write_bytes(data)
            for index in objects:
                info = described.storage_data[index]
                described.storage_data[index] = replace(info, relative_path="object.distcp", offset=0, length=len(data))
            (saved / ".metadata").write_bytes(pickle.dumps(described))
            try:
                store.load(saved, policy)
            except (UnsafeFileError, CheckpointError) as error:
                errors[name] = f"{type(error).__name__}: {error}"
    return errors


def test_neither_description_nor_objects_of_a_checkpoint_run_code(tmp_path: Path) -> None:
    (errors,) = run_ranks(1, read_hostile, tmp_path)
    assert not (tmp_path / "code-has-run").exists()
    assert errors["training"].startswith("UnsafeFileError: ") and errors["weights"].startswith("UnsafeFileError: ")
    assert re.match(r"UnsafeFileError: .* holds an object of \S*mkdir, which is no plain data", errors["object"])
    assert errors["bare pickle"].startswith("CheckpointError: ")
