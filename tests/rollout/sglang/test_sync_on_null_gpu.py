"""Weight sync on a GPU without arithmetic: memory, streams, launches, and the handles that servers get."""

from __future__ import annotations

import base64
import os
import pickletools
import subprocess
from pathlib import Path
from typing import Any

import pytest
from null_gpu import needs_null_gpu, on_null_gpu
from sync_ranks import GIB, broadcast_that_never_ends, digests_and_handles, turns

from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.costs.memory import beside_servers, moved_bytes, resident
from megatron_hdpo.costs.workload import RolloutSetup
from megatron_hdpo.planner.shapes import SHAPES
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig

pytestmark = [pytest.mark.long, needs_null_gpu]
HELPERS = Path(__file__).parents[2] / "helpers"


def test_a_broadcast_that_never_ends_holds_no_other_work_of_the_trainer() -> None:
    found = on_null_gpu(broadcast_that_never_ends)
    assert found["trainer_goes_on"], "the default stream waits for nothing while the broadcast is stuck"
    assert found["seconds"] < 20 and "did not end within 1 s" in found["errors"][0]
    assert found["lost"] == {"Broadcast": 1, "Abort": 1}, "given up at the first bucket, and aborted"
    assert found["next"] == {"Broadcast": 3} and found["state"] == "serving"
    assert found["left"]["Abort"] == 1


@pytest.fixture(scope="module")
def costs() -> dict[str, Any]:
    return on_null_gpu(digests_and_handles, 3)


def test_digests_read_the_weights_once(costs: dict[str, Any]) -> None:
    found = costs["tensor of 128 MiB"]
    assert found["launches"] == 1 and found["kernels"] == ["tile_sums_kernel"]
    assert found["waits"] == 1, "for the result"
    sums = 128 * 2**20 // 32768 * 8
    assert found["copied"] <= 2 * sums and found["scratch"] <= 2 * sums, "8 bytes per tile of 32 KiB"


@pytest.mark.parametrize("ranks", [1, 2])
def test_digests_of_fused_and_split_parameters_copy_no_weights(costs: dict[str, Any], ranks: int) -> None:
    found = costs[f"layer on {ranks}"]
    assert found["parameters"] == [7] * ranks
    assert found["launches"] <= found["pieces"] + 1, "a launch per piece, and one that puts the sums together"
    assert found["waits"] == 1
    assert found["scratch"] < 2**20


def test_handles_need_nothing_of_sglang_and_sglang_reads_them(
    costs: dict[str, Any], sglang_config: ServerConfig
) -> None:
    found = costs["handles"]
    assert not found["sglang"]
    pickled = base64.b64decode(found["text"])
    strings = [argument for _, argument, _ in pickletools.genops(pickled) if isinstance(argument, str)]
    assert "rebuild_cuda_tensor" in strings and found["uuid"] in strings
    assert not [text for text in strings if text.startswith(("sglang", "megatron_hdpo"))]
    # The server sees that GPU as its first one.
    environment = os.environ | sglang_config.environment
    command = [sglang_config.interpreter, "-W", "ignore", HELPERS / "open_handles.py", found["uuid"]]
    opened = subprocess.run(
        command, env=environment, input=found["text"], capture_output=True, text=True, timeout=600, check=False
    )
    assert opened.returncode == 0, opened.stderr
    assert opened.stdout.split()[-4:] == ["device", "0", "bytes", "76"], opened.stdout


def test_a_server_finds_its_memory_after_an_update() -> None:
    """Qwen2.5-7B, TP 2, on an H100 whose server takes half of the memory, as examples/qwen2.5-7b has it."""
    weights, cache = int(7.1 * GIB), int(30.0 * GIB)
    layout = {"tensor": 2, "sequence": True}
    found = on_null_gpu(turns, layout, weights, cache, 4, rank=0, world=16, gpu="h100")
    assert found["after_update_gib"]["free"] < 30, "else this test shows nothing"
    calls = [(step["call"], step["room"]) for step in found["steps"]]
    assert calls == [
        ("/release_memory_occupation", True),
        ("/resume_memory_occupation weights", True),
        ("/resume_memory_occupation kv_cache cuda_graph", True),
        ("/release_memory_occupation", True),
    ]
    assert found["steps"][1]["free_gib"] > 37.1 and found["state"] == "serving"


def test_a_server_has_the_place_of_the_trainers_state() -> None:
    """The same model, and a server of 65 GiB: 27 GiB at home, the trainer's state leaves for it as the plan says."""
    weights, cache = int(7.1 * GIB), int(58.0 * GIB)
    layout = Layout(tensor=2, data=8, sequence=True, spec="torch", overlap=True)
    found = on_null_gpu(turns, {"tensor": 2, "sequence": True}, weights, cache, 4, "all", rank=0, world=16, gpu="h100")
    assert [step["room"] for step in found["steps"]] == [True] * 6 and found["state"] == "serving"
    beside, back = found["beside_server"], found["back"]
    model, rollouts = SHAPES["qwen2.5-7b"], RolloutSetup("colocated", trainer_memory="all")
    held = resident(model, layout, 0)
    leaves = sum(held.values()) - sum(beside_servers(held, rollouts).values())
    # The allocator does not split off the last megabyte of a block.
    assert back - beside["allocated"] == pytest.approx(leaves, rel=0.005)
    assert beside["pinned"] == pytest.approx(sum(moved_bytes(model, layout, rollouts)), rel=0.002)
    assert beside["allocated"] < GIB / 4
