"""The text that carries weights in a request: values on a CPU, a handle that names its GPU by UUID on a GPU."""

from __future__ import annotations

import asyncio
import base64
import io
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import reductions

from megatron_hdpo.rollout.sglang.weights import payload
from megatron_hdpo.rollout.sglang.weights.payload import flattened, request_text
from megatron_hdpo.rollout.sglang.weights.transports import TensorTransport

BUCKET = [("a", torch.arange(15.0).view(3, 5)), ("b", torch.ones(3, dtype=torch.bfloat16))]


def test_a_flat_bucket_says_where_each_tensor_is() -> None:
    flat, metadata = flattened(BUCKET)
    assert flat.dtype == torch.uint8 and len(flat) == 66
    for (name, tensor), entry in zip(BUCKET, metadata, strict=True):
        part = flat[entry.start_idx : entry.end_idx].clone().view(entry.dtype).view(entry.shape)
        assert entry.name == name and torch.equal(part, tensor)


def test_on_a_cpu_the_text_holds_the_values() -> None:
    opened = pickle.loads(base64.b64decode(request_text(*flattened(BUCKET))))
    assert torch.equal(opened["flattened_tensor"], flattened(BUCKET)[0])


def test_a_handle_is_torchs_own_but_for_the_gpus_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = reductions.rebuild_cuda_tensor.__code__.co_varnames[: reductions.rebuild_cuda_tensor.__code__.co_argcount]

    def reduced(tensor: Tensor) -> Any:
        arguments = {name: name for name in names} | {"storage_device": 3, "dtype": tensor.dtype}
        return reductions.rebuild_cuda_tensor, tuple(arguments.values())

    monkeypatch.setattr(payload, "reduce_tensor", reduced)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"uuid of {index}"))
    buffer = io.BytesIO()
    payload._HandlePickler(buffer).dump({"flattened_tensor": torch.ones(2), "other": [1, "x"]})
    # As in a server, where the function of this name is another one.
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda *values: dict(zip(names, values, strict=True)))
    opened = pickle.loads(buffer.getvalue())
    assert opened["other"] == [1, "x"]
    handle = opened["flattened_tensor"]
    assert handle == {name: name for name in names} | {"storage_device": "uuid of 3", "dtype": torch.float32}


def test_memory_that_no_server_reads_is_not_shared() -> None:
    """torch keeps shared memory until the other side lets go of it: a handle that nobody opens is memory lost."""
    servers = SimpleNamespace(replicas=["a server"])
    alone = TensorTransport(1.0)
    assert list(alone.prepare(BUCKET)) == [], "a rank on whose GPU no server runs"
    asyncio.run(alone.open(servers))  # type: ignore[arg-type]
    assert len(alone.prepare(BUCKET)) == 1
    servers.replicas.clear()
    assert list(alone.prepare(BUCKET)) == [], "all were lost amid the update"
    answers: list[Any] = [True, False]
    beside = TensorTransport(1.0, lambda mine: [answers.pop(0), mine] if isinstance(mine, bool) else ["other", mine])
    assert len(beside.prepare(BUCKET)) == 2, "a server of another rank reads this rank's memory, too"
    assert list(beside.prepare(BUCKET)) == []
