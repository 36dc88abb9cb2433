"""Command line and environment of a server: pure functions of the settings and the run's decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hdpo.parallel.cores import usable_cores
from megatron_hdpo.rollout.sglang.servers.arguments import REFUSED_VARIABLES, canonical

if TYPE_CHECKING:
    from megatron_hdpo.rollout.sglang.servers.config import ServerConfig

CPU_CACHE_TOKENS = 65_536
"""Size of the key-value cache on a CPU; without a bound SGLang takes most of the host's memory for it."""

_LARGEST_FRACTION = 0.97
"""Most of the free memory that weights and key-value cache may take; the rest is for activations."""

# Variables of torchrun: with them the server's processes would connect to the trainer's store.
_TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"}
_TORCHRUN |= {"ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
# Settings of the trainer's allocator. torch_memory_saver refuses to run with expandable_segments among them.
_ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}


class NoRoomError(ValueError):
    """The GPU has no room for the memory that the recipe gives to a server."""


@dataclass(frozen=True)
class ServerLaunch:
    """Settings of one server that the run decides.

    model: Hugging Face folder to load. device: "cuda" or "cpu". index: number of the server in the run. first_gpu:
    first of its `tensor_parallel` devices, among those visible to this process. routed_experts: the server must return
    the experts it used. free_share: returns the share of the GPU's memory that is free; None: the server is alone.
    """

    model: Path
    device: str
    index: int = 0
    first_gpu: int = 0
    routed_experts: bool = False
    free_share: Callable[[], float] | None = None


def server_command(
    config: ServerConfig, launch: ServerLaunch, host: str, port: int, nccl_port: int, key_file: Path | None = None
) -> list[str]:
    """Return the arguments of the server's process.

    key_file: YAML file with the API key, which a command line would show to all users. Raises ValueError while the
    precision is auto: SGLang's own auto may choose float16.
    """
    if config.dtype == "auto":
        raise ValueError("SGLang servers: dtype=auto is not resolved yet: pass the precision of the model")
    values: dict[str, object] = {
        "config": key_file,
        "model-path": launch.model,
        "device": launch.device,
        "host": host,
        "port": port,
        "nccl-port": nccl_port,
        "dtype": config.dtype,
        "tp-size": config.tensor_parallel,
        "base-gpu-id": launch.first_gpu if launch.device == "cuda" else None,
        "quantization": config.quantization,
        "context-length": config.context_length,
        "mem-fraction-static": memory_fraction(config, launch),
        "max-total-tokens": config.max_total_tokens or (CPU_CACHE_TOKENS if launch.device == "cpu" else None),
        "max-running-requests": config.max_running_requests,
        "attention-backend": config.attention_backend,
        # An idle scheduler would otherwise keep a core busy that the trainer can use.
        "sleep-on-idle": True,
        # A warm-up would still run after the server answers, and delay the first weight update.
        "skip-server-warmup": True,
        # Prompts and answers are token ids; the text of each answer would cost the server time.
        "skip-tokenizer-init": True,
        # A streamed piece would otherwise hold all tokens so far.
        "incremental-streaming-output": True,
        "enable-return-routed-experts": launch.routed_experts or None,
        "enable-memory-saver": config.memory_saver or None,
        # A sync overwrites every weight before the server samples again; of quantised ones that is not known.
        "enable-weights-cpu-backup": (config.memory_saver and config.quantization is not None) or None,
    } | {canonical(flag): value for flag, value in config.extra_args.items()}
    command = [str(config.interpreter), "-m", "sglang.launch_server"]
    for flag, value in values.items():
        if value is not None:
            command += [f"--{flag}", *_words(value)]
    return command


def memory_fraction(config: ServerConfig, launch: ServerLaunch) -> float | None:
    """Return SGLang's --mem-fraction-static for a start now; None: its own estimate.

    The recipe names a share of the whole GPU. SGLang takes its number of the memory that is free when the server
    starts, before it loads weights. Raises NoRoomError when less is free than the recipe asks for.
    """
    wanted, free_share = config.mem_fraction_static, launch.free_share
    if wanted is None or free_share is None:
        return wanted
    free = free_share()
    if wanted > _LARGEST_FRACTION * free:
        raise NoRoomError(
            f"mem_fraction_static={wanted:g} asks for {wanted:.0%} of a GPU of which {free:.0%} are free: lower it, or "
            "let the trainer make room (rollout.sglang.trainer_memory)"
        )
    return round(wanted / free, 4)


def _words(value: object) -> list[str]:
    if value is True:
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def server_environment(config: ServerConfig, device: str, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a server: `base` without the trainer's own variables, plus `config.environment`.

    Variables that `config.environment` may not name are left out of `base`, too.
    """
    own = _TORCHRUN | _ALLOCATOR | REFUSED_VARIABLES.keys()
    environment = {
        name: value for name, value in base.items() if name not in own and not name.startswith("TORCHELASTIC_")
    }
    if config.python is not None:
        # Modules on this path were built for another interpreter.
        environment.pop("PYTHONPATH", None)
    if device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        if config.tensor_parallel > 1:
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = core_groups(usable_cores(), config.tensor_parallel)
    return environment | config.environment


def core_groups(cores: list[int], groups: int) -> str:
    """Split `cores` into equal consecutive groups, written in SGLang's format: "0,1|2,3".

    Raises ValueError when there are fewer cores than groups.
    """
    if groups > len(cores):
        raise ValueError(
            f"SGLang servers: tensor_parallel={groups} on a CPU needs {groups} cores; here are {len(cores)}"
        )
    size = len(cores) // groups
    return "|".join(",".join(map(str, cores[i * size : (i + 1) * size])) for i in range(groups))
