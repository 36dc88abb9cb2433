"""Settings, the command line and environment they make, and what is refused before a server starts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_hdpo.rollout.sglang.servers import supervisor
from megatron_hdpo.rollout.sglang.servers.arguments import RESERVED_FLAGS
from megatron_hdpo.rollout.sglang.servers.command import (
    CPU_CACHE_TOKENS,
    NoRoomError,
    ServerLaunch,
    core_groups,
    server_command,
    server_environment,
)
from megatron_hdpo.rollout.sglang.servers.config import ServerConfig

MODEL = Path("/models/tiny")


def flags(config: ServerConfig, device: str = "cpu", **launch: Any) -> dict[str, list[str]]:
    """The words after each flag of the command line."""
    command = server_command(config, ServerLaunch(MODEL, device, **launch), "127.0.0.1", 4000, 4001)
    assert command[:3] == [str(config.interpreter), "-m", "sglang.launch_server"]
    found: dict[str, list[str]] = {}
    for word in command[3:]:
        if word.startswith("--"):
            assert word not in found, "no flag twice"
            found[word] = words = []
        else:
            words.append(word)
    return found


def test_a_server_on_a_cpu_has_a_bounded_cache_and_no_flag_of_gpus() -> None:
    assert flags(ServerConfig(dtype="float32")) == {
        "--model-path": [str(MODEL)],
        "--device": ["cpu"],
        "--host": ["127.0.0.1"],
        "--port": ["4000"],
        "--nccl-port": ["4001"],
        "--dtype": ["float32"],
        "--tp-size": ["1"],
        "--max-total-tokens": [str(CPU_CACHE_TOKENS)],
        "--sleep-on-idle": [],
        "--skip-server-warmup": [],
        "--skip-tokenizer-init": [],
        "--incremental-streaming-output": [],
    }


def test_a_run_that_replays_routing_has_servers_that_tell_it() -> None:
    assert flags(ServerConfig(dtype="float32"), routed_experts=True)["--enable-return-routed-experts"] == []


def test_settings_become_flags() -> None:
    config = ServerConfig(
        dtype="bfloat16",
        tensor_parallel=2,
        quantization="fp8",
        context_length=4096,
        mem_fraction_static=0.5,
        max_running_requests=64,
        attention_backend="fa3",
        memory_saver=True,
        extra_args={"cuda_graph_bs": ["1", "8"], "--disable-radix-cache": True, "page-size": 7},
    )
    got = flags(config, "cuda", first_gpu=4)
    expected = {
        "--dtype": ["bfloat16"],
        "--tp-size": ["2"],
        "--quantization": ["fp8"],
        "--context-length": ["4096"],
        "--mem-fraction-static": ["0.5"],
        "--max-running-requests": ["64"],
        "--attention-backend": ["fa3"],
        "--enable-memory-saver": [],
        "--enable-weights-cpu-backup": [],
        "--base-gpu-id": ["4"],
        "--cuda-graph-bs": ["1", "8"],
        "--disable-radix-cache": [],
        "--page-size": ["7"],
    }
    assert expected.items() <= got.items() and "--max-total-tokens" not in got


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ({}, False),
        ({"quantization": "fp8"}, True),
        ({"extra_args": {"--speculative-algorithm": "NGRAM"}}, False),
        ({"memory_saver": False, "quantization": "fp8"}, False),
    ],
)
def test_only_weights_that_no_sync_writes_wait_in_host_memory(setting: dict[str, Any], kept: bool) -> None:
    config = ServerConfig(dtype="bfloat16", **({"memory_saver": True} | setting))
    assert ("--enable-weights-cpu-backup" in flags(config, "cuda")) == kept


@pytest.mark.parametrize(("free", "given"), [(1.0, "0.5"), (0.8, "0.625"), (0.6, "0.8333")])
def test_a_share_of_the_gpu_becomes_sglangs_share_of_what_is_free(free: float, given: str) -> None:
    """SGLang: cache = free now - (1 - fraction) x free at the start; so weights and cache are fraction x free."""
    config = ServerConfig(dtype="bfloat16", mem_fraction_static=0.5)
    assert flags(config, "cuda", free_share=lambda: free)["--mem-fraction-static"] == [given]
    assert flags(config, "cuda")["--mem-fraction-static"] == ["0.5"], "alone on its GPU"
    assert "--mem-fraction-static" not in flags(ServerConfig(dtype="bfloat16"), "cuda", free_share=lambda: free)


def test_a_gpu_without_room_for_a_server_is_said() -> None:
    config = ServerConfig(dtype="bfloat16", mem_fraction_static=0.5)
    with pytest.raises(NoRoomError, match=r"asks for 50% of a GPU of which 45% are free.*trainer_memory"):
        flags(config, "cuda", free_share=lambda: 0.45)


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_the_settings_of_the_trainers_allocator_stay_with_it(name: str) -> None:
    base = {name: "expandable_segments:True", "PATH": "/bin"}
    assert server_environment(ServerConfig(), "cuda", base) == {"PATH": "/bin"}
    own = ServerConfig(environment={name: "max_split_size_mb:64"})
    assert server_environment(own, "cuda", base)[name] == "max_split_size_mb:64", "the servers' own"


def test_every_flag_of_a_command_line_is_reserved() -> None:
    every = ServerConfig(
        dtype="bfloat16", quantization="fp8", context_length=1, mem_fraction_static=0.5, max_total_tokens=1
    )
    every = every.model_copy(update={"max_running_requests": 1, "attention_backend": "x", "memory_saver": True})
    assert {flag.removeprefix("--") for flag in flags(every, "cuda")} <= set(RESERVED_FLAGS)


@pytest.mark.parametrize("flag", ["port", "--model_path", "dtype", "tp"])
def test_an_extra_flag_cannot_override_what_is_decided_elsewhere(flag: str) -> None:
    with pytest.raises(ValueError, match=rf"extra_args\.{flag} is "):
        ServerConfig(extra_args={flag: "1"}).check("cuda")


def test_sglang_never_chooses_the_precision() -> None:
    """Its own auto may be float16."""
    with pytest.raises(ValueError, match="dtype=auto is not resolved yet"):
        flags(ServerConfig())


def test_a_flag_that_is_not_wanted_is_left_out() -> None:
    with pytest.raises(ValueError, match="left out"):
        ServerConfig(extra_args={"disable-radix-cache": False}).check("cuda")


FP8 = {"quantization": "fp8", "extra_args": {"load-format": "flash_rl"}}


@pytest.mark.parametrize("setting", [FP8, {"memory_saver": True}, {"mem_fraction_static": 0.5}])
def test_what_needs_a_gpu_is_refused_on_a_cpu(setting: dict[str, Any]) -> None:
    ServerConfig(**setting).check("cuda")
    with pytest.raises(ValueError, match=rf"{next(iter(setting))}=.* needs a GPU"):
        ServerConfig(**setting).check("cpu")


@pytest.mark.parametrize("extra", [{}, {"load-format": "auto"}])
def test_quantised_weights_that_could_not_be_updated(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"quantization=fp8: SGLang quantises weights once.*load-format: flash_rl"):
        ServerConfig(quantization="fp8", extra_args=extra).check("cuda")
    ServerConfig(quantization="fp8", extra_args={"--load_format": "flash_rl"}).check("cuda")


@pytest.mark.parametrize("setting", [{"dtype": "half"}, {"port": 30000}, {"tensor_parallel": 0}])
def test_settings_that_make_no_sense_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ServerConfig(**setting)


def test_a_server_does_not_inherit_the_trainers_rank() -> None:
    base = {"RANK": "3", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "HOME": "/h", "PYTHONPATH": "/p"}
    assert server_environment(ServerConfig(), "cuda", base) == {"HOME": "/h", "PYTHONPATH": "/p"}
    other = ServerConfig(python=Path("/other/python"), environment={"HOME": "/x"})
    assert server_environment(other, "cuda", base) == {"HOME": "/x"}


def test_a_server_on_a_cpu_is_told_so_and_its_ranks_have_cores_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2, 3, 4})
    assert server_environment(ServerConfig(), "cpu", {}) == {"SGLANG_USE_CPU_ENGINE": "1"}
    assert server_environment(ServerConfig(tensor_parallel=2), "cpu", {}) == {
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "0,1|2,3",
    }


def test_more_ranks_than_cores_are_refused() -> None:
    assert core_groups([4, 5, 9], 3) == "4|5|9"
    with pytest.raises(ValueError, match="needs 4 cores; here are 3"):
        core_groups([4, 5, 9], 4)


def python_that(tmp_path: Path, script: str) -> ServerConfig:
    """Settings with an "interpreter" that does what the shell script says."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return ServerConfig(python=python)


def test_the_interpreters_sglang_is_asked_for(tmp_path: Path) -> None:
    assert str(python_that(tmp_path, "echo hello; echo 0.5.23.post1").check_interpreter("cpu")) == "0.5.23.post1"


@pytest.mark.parametrize(
    ("script", "complaint"),
    [("echo 0.5.14", "has SGLang 0.5.14, older than 0.5.15"), ("exit 1", "has no SGLang"), ("true", "has no SGLang")],
)
def test_an_interpreter_without_a_usable_sglang_is_refused(tmp_path: Path, script: str, complaint: str) -> None:
    config = python_that(tmp_path, script)
    with pytest.raises(ValueError, match=rf"{re.escape(f'{config.python} {complaint}')}.*megatron-hdpo\[sglang\]"):
        config.check_interpreter("cpu")


def test_a_missing_interpreter_is_refused(tmp_path: Path) -> None:
    config = ServerConfig(python=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not run"):
        config.check_interpreter("cpu")


def test_the_supervisor_is_small() -> None:
    listing = (
        "import runpy, sys; before = set(sys.modules); "
        f"runpy.run_path({supervisor.__file__!r}, run_name='supervisor'); "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    modules = subprocess.run([sys.executable, "-ISc", listing], capture_output=True, text=True, check=True).stdout
    assert set(modules.split()) <= set(sys.stdlib_module_names)
