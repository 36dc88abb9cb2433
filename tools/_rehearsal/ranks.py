"""One rank's rehearsal, in its process on the null GPU, and what it tells."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from _rehearsal.device import NullGpu
from _rehearsal.meter import Measured, Meter, peak_rss
from _rehearsal.program import rehearse
from _rehearsal.replaced import Rehearsed
from _rehearsal.servers import ServerMemory
from _rehearsal.setting import Asked, Setting, setting_of
from megatron_hdpo.costs.cluster import GIB
from megatron_hdpo.costs.memory import engine_weights
from megatron_hdpo.model.config import choose_spec
from megatron_hdpo.types.errors import UserError

# Of the CUDA context and NCCL's buffers, which no allocation shows. Assumed.
CONTEXT_BYTES = int(1.5 * GIB)


def run(gpu: NullGpu, fields: dict[str, Any]) -> dict[str, Any]:
    """Rehearse this process's rank; fields: those of Asked. The result is JSON (see `_told`)."""
    setting = setting_of(Asked(**fields))
    gpu.occupy(CONTEXT_BYTES)
    memory, meter = _server(gpu, setting), Meter(gpu)
    failure, done = None, None
    try:
        done = rehearse(
            setting.recipe, setting.architecture, setting.workload.teacher_model, setting.workload, meter, memory
        )
    except torch.cuda.OutOfMemoryError as error:
        failure = _failure(meter, " ".join(str(error).split(". ")[:2]))
    except UserError as error:
        if memory is None or memory.refused is None:
            raise
        tag, wanted, free = memory.refused
        failure = _failure(
            meter, f"a server asks for {wanted / GIB:.2f} GiB ({tag}) and {free / GIB:.2f} are free; {error}"
        )
    return _told(setting, meter, done, failure)


def _server(gpu: NullGpu, setting: Setting) -> ServerMemory | None:
    """Return the memory of a server that shares this rank's GPU, None where none does."""
    rollouts = setting.rollouts
    if rollouts.engine != "colocated":
        return None
    weights = int(engine_weights(setting.architecture, rollouts))
    total = torch.cuda.mem_get_info()[1]
    fraction = rollouts.memory_fraction if rollouts.memory_fraction is not None else 0.0
    return ServerMemory(gpu, weights, max(0, int(fraction * total) - weights))


def _failure(meter: Meter, text: str) -> dict[str, Any]:
    return {
        "phase": meter.now[-1] if meter.now else "start",
        "text": text,
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "free": meter.gpu.num_bytes("free"),
    }


def _told(setting: Setting, meter: Meter, done: Rehearsed | None, failure: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "stage": meter.context.groups.pp.rank() if meter.context is not None else 0,
        "spec": choose_spec(setting.recipe.model, torch.device("cuda")),
        "total": torch.cuda.mem_get_info()[1],
        "phases": [_phase(measured) for measured in meter.phases],
        "updates": [[asdict(shape) for shape in update] for update in done.shapes] if done is not None else [],
        "scored": [asdict(shape) for shape in done.scored] if done is not None else [],
        "head_chunk": done.head_chunk if done is not None else 0,
        "saved": done.saved if done is not None else 0,
        "pinned": max((measured.pinned for measured in meter.phases), default=0),
        "rss": peak_rss(),
        "failure": failure,
    }


def _phase(measured: Measured) -> dict[str, Any]:
    return asdict(measured) | {"collectives": [[*key, *value] for key, value in measured.collectives.items()]}
