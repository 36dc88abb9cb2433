"""What a rank on the null GPU does in tests of weight sync: a trainer beside a stand-in for its server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from _rehearsal.servers import opened
from fault_proxy import serving, status
from stand_in_server import StandIn
from torch import Tensor

from megatron_hdpo.rollout.sglang.config import SGLangConfig
from megatron_hdpo.rollout.sglang.engine import SGLangEngine
from megatron_hdpo.rollout.sglang.shared_gpu import CudaMemory, SharedGpu
from megatron_hdpo.rollout.sglang.weights.payload import flattened, request_text
from megatron_hdpo.rollout.sglang.weights.push import Transport, WeightPush, WeightPushError
from megatron_hdpo.rollout.sglang.weights.transports import BroadcastTransport, TensorTransport

GIB = 2**30
DEVICE = torch.device("cuda", 0)


@contextmanager
def pushing(
    server: StandIn, transport: Transport, shared: SharedGpu | None = None, **settings: Any
) -> Iterator[tuple[SGLangEngine, WeightPush]]:
    with serving(server):
        config = SGLangConfig.model_validate({"health_interval_s": 60} | settings)
        engine = SGLangEngine(config, [server.url], 17, 128, shared_gpu=shared)
        try:
            yield engine, WeightPush(engine, transport, None)
        finally:
            engine.close()


def layers(count: int, elements: int) -> Iterator[tuple[str, Tensor]]:
    for layer in range(count):
        yield f"model.layers.{layer}.input_layernorm.weight", torch.zeros(elements, dtype=torch.bfloat16, device=DEVICE)


def broadcast_that_never_ends(gpu: Any) -> dict[str, Any]:
    """The server answers each bucket, and dies before the broadcast has taken place."""
    torch.cuda.set_device(DEVICE)
    server, found = StandIn(), {}
    errors: list[str] = []
    transport = BroadcastTransport(1.0, DEVICE)
    with pushing(server, transport, sync={"bucket_mib": 1}) as (engine, push), gpu.counted():

        def work() -> None:
            try:
                push.push(layers(3, 2**20), 1)
            except WeightPushError as error:
                errors.append(str(error))

        with gpu.hanging():
            began = time.monotonic()
            pusher = threading.Thread(target=work)
            pusher.start()
            while not _collectives(gpu).get("Broadcast"):
                time.sleep(0.01)
            time.sleep(0.2)
            torch.ones(4, device=DEVICE).add_(1)
            found["trainer_goes_on"] = torch.cuda.default_stream(DEVICE).query() and pusher.is_alive()
            pusher.join(60)
        found["seconds"], found["errors"] = time.monotonic() - began, errors
        found["lost"] = _collectives(gpu)
        gpu.clear()
        push.push(layers(3, 2**20), 2)
        found["next"], found["state"] = _collectives(gpu), engine.replicas[0].state
        push.close()
        found["left"] = _collectives(gpu)
    return found


def _collectives(gpu: Any) -> dict[str, int]:
    return {count.name: count.times for count in gpu.counts() if count.kind == "N"}


def digests_of_a_tensor(gpu: Any, mib: int) -> dict[str, Any]:
    """What the digest of one tensor costs: launches, waits, bytes that copies move, scratch memory."""
    from megatron_hdpo.rollout.sglang.weights.digests import digests_of_servers

    tensor = torch.zeros(mib * 2**19, dtype=torch.bfloat16, device=DEVICE)
    digests = digests_of_servers("cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with gpu.counted():
        digests.append((0, "w"), tensor)
        digests.result()
    return _cost(gpu, before)


def digests_of_a_layer(gpu: Any, ranks: int) -> dict[str, Any]:
    """A layer of Qwen2.5-7B for a server of `ranks` ranks."""
    from megatron_hdpo.rollout.sglang.weights.digests import digests_of_servers
    from megatron_hdpo.rollout.sglang.weights.served_parameters import ServedParameters

    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (3584,),
        "post_attention_layernorm.weight": (3584,),
        "self_attn.q_proj.weight": (3584, 3584),
        "self_attn.k_proj.weight": (512, 3584),
        "self_attn.v_proj.weight": (512, 3584),
        "self_attn.q_proj.bias": (3584,),
        "self_attn.k_proj.bias": (512,),
        "self_attn.v_proj.bias": (512,),
        "self_attn.o_proj.weight": (3584, 3584),
        "mlp.gate_proj.weight": (18944, 3584),
        "mlp.up_proj.weight": (18944, 3584),
        "mlp.down_proj.weight": (3584, 18944),
    }
    full = {name: torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE) for name, shape in shapes.items()}
    parameters = ServedParameters(ranks, 4, digests_of_servers("cuda"))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with gpu.counted():
        for name, tensor in full.items():
            parameters.add(f"model.layers.0.{name}", tensor)
        held = parameters.by_rank()
    return _cost(gpu, before) | {"parameters": [len(one) for one in held], "pieces": len(full) * ranks}


def _cost(gpu: Any, before: int) -> dict[str, Any]:
    return {
        "launches": gpu.total("K"),
        "kernels": sorted({count.name for count in gpu.counts() if count.kind == "K"}),
        "waits": gpu.total("S"),
        "copied": sum(count.a * count.times for count in gpu.counts() if count.kind in "CD"),
        "scratch": torch.cuda.max_memory_allocated() - before,
    }


def digests_and_handles(gpu: Any, index: int) -> dict[str, Any]:
    """All that needs no policy. index: of the GPU whose memory the handles are of."""
    found = {"tensor of 128 MiB": digests_of_a_tensor(gpu, 128)}
    found |= {f"layer on {ranks}": digests_of_a_layer(gpu, ranks) for ranks in (1, 2)}
    return found | {"handles": handles_of_a_bucket(index)}


def handles_of_a_bucket(index: int) -> dict[str, Any]:
    """The text that a request carries, made where SGLang is not installed."""
    import importlib.util

    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    bucket = [("a", torch.ones(3, 5, device=device)), ("b", torch.ones(8, dtype=torch.bfloat16, device=device))]
    text = request_text(*flattened(bucket))
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return {"text": text, "uuid": uuid, "sglang": importlib.util.find_spec("sglang") is not None}


def turns(
    gpu: Any, layout: dict[str, Any], weights: int, cache: int, examples: int, leaving: str = "keep"
) -> dict[str, Any]:
    """A 7B policy trains and syncs while a server with `weights` and `cache` bytes comes and goes on the same GPU.

    leaving: of the trainer's memory; unless it is keep, the server sleeps first.
    """
    from megatron_hdpo.model.build import build_model, wrap_data_parallel
    from megatron_hdpo.model.config import ModelConfig, OptimizerConfig
    from megatron_hdpo.model.optimizer import build_optimizer
    from megatron_hdpo.model.policy import Policy
    from megatron_hdpo.model.trainer_memory import TrainerMemory
    from megatron_hdpo.parallel.context import start
    from megatron_hdpo.parallel.layout import ParallelConfig
    from megatron_hdpo.planner.shapes import SHAPES
    from megatron_hdpo.types.learning import LossSpec, SurrogateConfig
    from megatron_hdpo.weights.stream import stream_hf

    context = start(ParallelConfig(**layout), "cuda")
    architecture = SHAPES["qwen2.5-7b"]
    server = StandIn({"weight": weights / GIB, "kvcache": cache / GIB})
    moves = {
        "/release_memory_occupation": -weights - cache,
        "/resume_memory_occupation weights": weights,
        "/resume_memory_occupation kv_cache cuda_graph": cache,
    }
    steps: list[dict[str, Any]] = []

    def occupied(call: str, asked: dict[str, Any]) -> None:
        for text in asked.get("serialized_named_tensors", []):
            opened(text)
        if call in moves:
            free = gpu.num_bytes("free")
            there_was_room = gpu.occupy(moves[call])
            steps.append({"call": call, "free_gib": free / GIB, "room": there_was_room})
            if not there_was_room:
                server.faults[call.split()[0]] = [status(500)] * 3

    server.on_call = occupied
    if leaving == "keep":
        assert gpu.occupy(weights + cache)
    model = build_model(architecture, context, ModelConfig(path="", dtype="bfloat16", spec="torch"))
    ddp = wrap_data_parallel(model, context)
    policy = Policy(architecture, context, ddp, 9216, *build_optimizer(OptimizerConfig(), ddp, context, 10))
    trainer = None if leaving == "keep" else TrainerMemory(policy, leaving)
    shared = SharedGpu(CudaMemory(context.device), context.rank, context.gather_objects, trainer, release_timeout_s=1.0)
    settings = {"servers": {"memory_saver": True}}
    found: dict[str, Any] = {}
    with pushing(server, TensorTransport(600.0), shared, **settings) as (engine, push):

        def sync(version: int) -> None:
            push.push(stream_hf(model, architecture, context, to="all"), version)

        engine.replicas[0].asleep = leaving != "keep"
        sync(0)
        engine.make_room()
        policy.update(_examples(examples, architecture.vocab_size), LossSpec(SurrogateConfig(), None, 1.0))
        found["after_update_gib"] = {
            "free": gpu.num_bytes("free") / GIB,
            "reserved": torch.cuda.memory_reserved() / GIB,
            "allocated": torch.cuda.memory_allocated() / GIB,
        }
        sync(1)
        found["state"] = engine.replicas[0].state
        found["beside_server"] = {"allocated": torch.cuda.memory_allocated(), "pinned": gpu.num_bytes("pinned_peak")}
        engine.make_room()
        found["back"] = torch.cuda.memory_allocated()
    return found | {"steps": steps}


def _examples(count: int, vocabulary: int) -> list[Any]:
    from megatron_hdpo.types.learning import Example

    rng, length = np.random.default_rng(0), 2048
    ones = np.ones(length, np.float32)
    return [
        Example(
            rng.integers(0, vocabulary, 256, dtype=np.int32),
            rng.integers(0, vocabulary, length, dtype=np.int32),
            advantages_T=ones,
            surrogate_weights_T=ones,
            surrogate_count=float(length),
            rollout_logprobs_T=-ones,
        )
        for _ in range(count)
    ]
