"""Run by te_python.py: both layer specs of every architecture on four ranks, and what differs between them.

    python te_python.py layer_specs FOLDER

FOLDER holds the checkpoints of tiny_checkpoints.py. Writes answer.json there, an entry per rank: for each layout and
architecture what differs, how much was compared and which layers are Transformer Engine's; and what te_checkpoints.py
found.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_helper import environment_of
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from te_checkpoints import read_by_the_other
from tiny_checkpoints import CASES, MOE_CASES, layout
from torch import nn

from megatron_hdpo.model import build
from megatron_hdpo.model.architecture import Architecture, read_architecture
from megatron_hdpo.model.config import ModelConfig
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.load import load_hf
from megatron_hdpo.weights.parameters import bind

RANKS = 4
EVERY, DENSE, EXPERTS = (*CASES, *MOE_CASES), tuple(CASES), tuple(MOE_CASES)
# name: (architectures, layout); replicas take what is left.
LAYOUTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "tp2": (DENSE, {"tensor": 2}),
    "tp2_sp_pp2": (EVERY, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "pp2_vp2": (EVERY, {"pipeline": 2, "virtual_stages": 2}),
    "ep2_cp2": (EXPERTS, {"expert": 2, "context": 2}),
    "pp2_ep2": (EXPERTS, {"pipeline": 2, "expert": 2}),
    "tp2_sp_ep2": (EXPERTS, {"tensor": 2, "sequence": True, "expert": 2}),
    "tp2_sp_ep2_etp2": (EXPERTS, {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2}),
}
# What DDP, the optimizer and the gradient norm read off a parameter. Absent and False are the same to them.
MARKS = ("tensor_model_parallel", "sequence_parallel", "shared", "shared_embedding", "is_embedding_or_output_parameter")
Facts = dict[Any, Any]


def main() -> None:
    folder = Path(sys.argv[1])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # Ranks are forked: imports are paid for once, and what was imported is not searched for garbage on each of them.
    gc.freeze()
    with ProcessPoolExecutor(RANKS, multiprocessing.get_context("fork")) as pool:
        ranks = list(pool.map(partial(_rank, store.port, folder), range(RANKS)))
    (folder / "answer.json").write_text(json.dumps(ranks))


def _rank(port: int, folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    os.environ |= environment_of(rank, RANKS, port)
    torch.set_num_threads(1)
    # A recipe cannot ask for these layers without a GPU: they would not compute.
    build.choose_spec = lambda config, device: config.spec
    compared = {name: dict(_compared(folder, *LAYOUTS[name])) for name in LAYOUTS}
    return compared | {"read": read_by_the_other(folder, folder / "written")}


def _compared(folder: Path, cases: tuple[str, ...], sizes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    with layout(**{"tensor": 1, "pipeline": 1} | sizes) as context:
        for case in cases:
            path, seen = folder / case, {}
            architecture = read_architecture(path)
            for spec in ("torch", "transformer_engine"):
                config = ModelConfig(path=str(path), dtype="bfloat16", spec=spec)
                model = build.build_model(architecture, context, config)
                load_hf(model, architecture, context, path)
                with context.megatron_calls():
                    seen[spec] = _parameters(model, architecture, context) | _stored(model)
            yield (
                case,
                {"differences": _differences(*seen.values()), "compared": len(seen["torch"]), "layers": _te(model)},
            )


def _parameters(model: nn.Module, architecture: Architecture, context: ParallelContext) -> Facts:
    """Facts about every parameter, by its slot in the table of weights."""
    return {slot: _about(parameter) for slot, (parameter, _) in bind(model, architecture, context).items()}


def _about(parameter: nn.Parameter) -> Facts:
    marks = {name: bool(getattr(parameter, name, False)) for name in MARKS}
    marks["allreduce"] = getattr(parameter, "allreduce", True)
    return marks | {
        "shape": tuple(parameter.shape),
        "dtype": str(parameter.dtype),
        "device": str(parameter.device),
        "trained": parameter.requires_grad,
        "bytes": parameter.detach().view(torch.uint8).numpy().tobytes(),
    }


def _stored(model: Any) -> Facts:
    """Facts about every piece that the rank writes into a checkpoint, by its name there and its place."""
    state = model.sharded_state_dict()
    apply_factories(state)
    pieces = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    return {
        (piece.key, piece.global_offset): {
            "global shape": piece.global_shape,
            "shape": piece.local_shape,
            "dtype": str(piece.dtype),
            "fragments": piece.axis_fragmentations,
            "axes in front": piece.prepend_axis_num,
            "replica": piece.replica_id,
            "padded": piece.allow_shape_mismatch,
        }
        for piece in pieces
    }


def _differences(torch_facts: Facts, engine_facts: Facts) -> list[str]:
    missing = [f"only one has {getattr(key, 'names', key)}" for key in torch_facts.keys() ^ engine_facts.keys()]
    return missing + [
        f"{getattr(key, 'names', key)}: {fact} is {value!r:.80} in torch, {engine_facts[key][fact]!r:.80} in the engine"
        for key in torch_facts.keys() & engine_facts.keys()
        for fact, value in torch_facts[key].items()
        if engine_facts[key][fact] != value
    ]


def _te(model: nn.Module) -> list[str]:
    """The names of the model's layers that are Transformer Engine's."""
    return sorted(
        {
            type(module).__name__
            for module in model.modules()
            if any(base.__module__.startswith("transformer_engine.") for base in type(module).__mro__)
        }
    )
