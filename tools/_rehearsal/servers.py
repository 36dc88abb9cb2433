"""Stand-ins for SGLang servers: they answer every call over HTTP, and take their memory on the null GPU."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from aiohttp import web
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from _rehearsal.device import NullGpu
from megatron_hdpo.health.version_sets import SESSIONS_SINCE
from megatron_hdpo.rollout import build
from megatron_hdpo.rollout.sglang import engine
from megatron_hdpo.rollout.sglang.servers.command import ServerLaunch
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.rollout.sglang.weights.gate import Gate
from megatron_hdpo.types.loop_thread import LoopThread

_ACCEPTED = (
    *("/pause_generation", "/continue_generation", "/abort_request", "/begin_weight_update", "/end_weight_update"),
    *("/update_weights_from_distributed", "/update_weights_from_disk"),
    *("/init_weights_update_group", "/destroy_weights_update_group"),
)


def opened(text: str) -> Any:
    """Return what a request carries, with tensors in the trainer's memory, as SGLang opens it.

    Until the result is let go of, the trainer cannot use that memory again.
    """
    return _Opener(io.BytesIO(base64.b64decode(text))).load()


class _Opener(pickle.Unpickler):
    """Finds the GPU of a handle by its UUID."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name in the pickle stands for."""
        found = super().find_class(module, name)
        return _rebuilt if found is rebuild_cuda_tensor else found


def _rebuilt(*arguments: Any) -> Tensor:
    place = list(inspect.signature(rebuild_cuda_tensor).parameters).index("storage_device")
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    return rebuild_cuda_tensor(*arguments[:place], uuids.index(arguments[place]), *arguments[place + 1 :])


@dataclass
class ServerMemory:
    """Memory of a server on this rank's GPU. refused: what it asked for in vain, with the bytes that were free."""

    gpu: NullGpu
    weights: int
    cache: int
    held: int = 0
    refused: tuple[str, int, int] | None = None

    def take(self, *tags: str) -> bool:
        """Take memory, of the weights or the cache; return False where the device has no room."""
        for tag, num_bytes in (("weights", self.weights), ("kv_cache", self.cache)):
            if tag in tags:
                free = self.gpu.num_bytes("free")
                if not self.gpu.occupy(num_bytes):
                    self.refused = tag, num_bytes, free
                    return False
                self.held += num_bytes
        return True

    def release(self) -> None:
        """Give all of it back."""
        self.gpu.occupy(-self.held)
        self.held = 0


class StandIn:
    """One server. memory: None where it runs on other GPUs."""

    def __init__(self, config: ServerConfig, memory: ServerMemory | None) -> None:
        self.config, self.memory = config, memory
        self.requests: dict[str, int] = {}
        self.num_bytes = 0
        self.url = ""
        self.stamp = "default"

    async def serve(self) -> None:
        """Listen on a free port of this machine."""
        application = web.Application(client_max_size=2**40)
        application.router.add_get("/server_info", self._info)
        application.router.add_get("/model_info", self._stamp)
        for path in _ACCEPTED:
            application.router.add_post(path, self._accept)
        application.router.add_post("/update_weights_from_tensor", self._read)
        application.router.add_post("/release_memory_occupation", self._release)
        application.router.add_post("/resume_memory_occupation", self._resume)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]

    async def _info(self, request: web.Request) -> web.Response:
        said = {
            "version": SESSIONS_SINCE,
            "tp_size": self.config.tensor_parallel,
            "dtype": self.config.dtype,
            "quantization": self.config.quantization,
            "enable_memory_saver": self.config.memory_saver,
            "enable_return_routed_experts": True,
        }
        if self.memory is not None:
            usage = {"weight": self.memory.weights / 2**30, "kvcache": self.memory.cache / 2**30}
            said["internal_states"] = [{"memory_usage": usage}]
        return web.json_response(said)

    async def _stamp(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.stamp})

    async def _accept(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.requests[request.path] = self.requests.get(request.path, 0) + 1
        self.num_bytes += len(body)
        if b'"weight_version"' in body:
            self.stamp = json.loads(body)["weight_version"]
        return web.json_response({"success": True, "message": ""})

    async def _read(self, request: web.Request) -> web.Response:
        """Open the trainer's memory and let go of it: before that the trainer cannot use it again."""
        payloads = (await request.json())["serialized_named_tensors"]
        if self.memory is not None:
            opened(payloads[0])  # all ranks' payloads are this one (world.py)
        return await self._accept(request)

    async def _release(self, request: web.Request) -> web.Response:
        if self.memory is not None:
            self.memory.release()
        return await self._accept(request)

    async def _resume(self, request: web.Request) -> web.Response:
        tags = (await request.json())["tags"]
        if self.memory is not None and not self.memory.take(*tags):
            return web.json_response({"message": f"out of memory: no room for {', '.join(tags)}"}, status=500)
        return await self._accept(request)


class StandInFleet:
    """The servers of a rank, in place of ServerFleet. The first one is on this rank's GPU."""

    def __init__(self, config: ServerConfig, count: int, memory: ServerMemory | None) -> None:
        self.servers = [StandIn(config, memory if index == 0 else None) for index in range(count)]
        self.processes = [SimpleNamespace(api_key=None, alive=lambda: True) for _ in self.servers]
        self._thread = LoopThread("stand-in servers")

    @property
    def urls(self) -> list[str]:
        """Addresses by server."""
        return [server.url for server in self.servers]

    def start(self, report: Any = None) -> None:
        """Start all servers; they take their memory."""
        for server in self.servers:
            self._thread.run(server.serve())
            if server.memory is not None:
                server.memory.take("weights", "kv_cache")

    def exhausted(self, index: int) -> bool:
        """Return True: nothing is restarted."""
        return True

    def close(self) -> None:
        """Stop."""
        self._thread.close()


@contextmanager
def stand_ins(memory: ServerMemory | None) -> Iterator[list[StandInFleet]]:
    """Start stand-ins where the run would start servers; yield the list that they come into.

    memory: of a server on this rank's GPU. Answers of servers that hold values (checksums, the probe) are not asked
    for; the trainer's side of them is.
    """
    fleets: list[StandInFleet] = []

    def fleet(config: ServerConfig, launches: Sequence[ServerLaunch], folder: Path) -> StandInFleet:
        fleets.append(StandInFleet(config, len(launches), memory))
        return fleets[-1]

    async def nothing(*_: Any) -> None:
        await asyncio.sleep(0)

    with ExitStack() as stack:
        for owner, name, stand_in in (
            (build, "ServerFleet", fleet),
            (ServerConfig, "check_interpreter", lambda *_: None),
            (Gate, "check", nothing),
            (Gate, "probe", nothing),
            (engine.Watch, "run", nothing),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        yield fleets
