"""Settings of SGLang servers, and checks before one starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict, Field

from megatron_hdpo.rollout.sglang.servers.arguments import REFUSED_VARIABLES, canonical, problems_of_flags
from megatron_hdpo.rollout.sglang.servers.command import server_environment

OLDEST_SGLANG = Version("0.5.15")
REQUANTISING_LOADER = "flash_rl"
"""The load format under which SGLang quantises updated weights again, for the models in REQUANTISED."""
SERVER_KEEPS_FREE = 2
"""Tokens of its context, and of its key-value cache, that a server fills with no response (0.5.23)."""
REQUANTISED = ("qwen2", "qwen3")
INSTALL = "install `megatron-hdpo[sglang]` there, or name another interpreter as `python`"

FlagValue = bool | int | float | str | list[str]


class ServerConfig(BaseModel):
    """One SGLang server; all servers of a run have the same settings."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    python: Path | None = Field(
        None, description="Interpreter of the environment that has SGLang; default: the trainer's own."
    )
    host: str = Field(
        "127.0.0.1",
        description="Address the servers listen on; `node` for the node's own, if other nodes must reach them. Any "
        "client that reaches a server can replace its weights: see `api_key`.",
    )
    api_key: bool = Field(False, description="Give every server a random key and refuse requests without it.")
    tensor_parallel: int = Field(1, ge=1, description="GPUs (on a CPU: groups of cores) that share one model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of weights, activations and key-value cache. auto: that of the model (model.dtype), so "
        "that engine and trainer agree on log-probs; SGLang never chooses it.",
    )
    quantization: Literal["fp8"] | None = Field(
        None,
        description="Quantise the weights. GPUs only, and only with extra_args={load-format: flash_rl}, see "
        "docs/rollouts-on-sglang.md.",
    )
    context_length: int | None = Field(
        None, ge=1, description="Longest prompt plus response in tokens; default: the model's own limit."
    )
    mem_fraction_static: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the whole GPU's memory for weights and key-value cache. By default SGLang's own "
        "estimate, most of what is free when a server starts.",
    )
    max_total_tokens: int | None = Field(
        None, ge=1, description="Size of the key-value cache in tokens; from the memory on a GPU, 65,536 on a CPU."
    )
    max_running_requests: int | None = Field(None, ge=1, description="Most samples that decode together.")
    attention_backend: str | None = Field(None, description="SGLang's attention kernels; its own choice by default.")
    memory_saver: bool = Field(
        False,
        description="Let the server give its GPU memory to the trainer between rollouts (colocated); the next sync "
        "writes its weights anew. GPUs only.",
    )
    extra_args: dict[str, FlagValue] = Field(
        default_factory=dict,
        description="Further flags of `sglang.launch_server` without their dashes; true for a flag without a value. "
        "Those that would spoil the run are refused: docs/rollouts-on-sglang.md lists them.",
    )
    environment: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables of the servers. Their values are in no file of the run, which has `***` in "
        "their place; in a recipe `***` takes the value of the trainer's own variable.",
    )
    start_timeout_s: float = Field(900.0, gt=0, description="Longest wait for a server to load and answer.")
    stop_timeout_s: float = Field(
        30.0,
        ge=0,
        description="Time for a server to shut down before it is killed. SGLang checks for the request every 5 s and "
        "gives its schedulers 15 s to free the GPU.",
    )
    max_restarts: int = Field(5, ge=0, description="Restarts of one server that died, in the whole run.")

    @property
    def interpreter(self) -> Path:
        """Return the Python interpreter that runs the servers."""
        return self.python or Path(sys.executable)

    @property
    def requantises(self) -> bool:
        """Return whether SGLang quantises updated weights as it did those that it loaded."""
        flags = {canonical(flag): value for flag, value in self.extra_args.items()}
        return flags.get("load-format") == REQUANTISING_LOADER

    def check(self, device: str) -> None:
        """Raise ValueError for settings that cannot work on `device` ("cuda" or "cpu"). Pure."""
        if device == "cpu":
            for name in ("quantization", "memory_saver", "mem_fraction_static"):
                if getattr(self, name):
                    raise ValueError(
                        f"SGLang servers: {name}={getattr(self, name)!r} needs a GPU, and the run's device is the CPU; "
                        f"leave {name} out"
                    )
        if self.quantization is not None and not self.requantises:
            # Seen in 0.5.23: the quantised parameter has lost its loader and is transposed; a new square matrix is
            # stored without its scale.
            raise ValueError(
                f"SGLang servers: quantization={self.quantization}: SGLang quantises weights once, when it loads them, "
                "and stores later ones wrongly or not at all; leave quantization out, or add "
                f"extra_args={{load-format: {REQUANTISING_LOADER}}} ({', '.join(REQUANTISED)} only, untested)"
            )
        for problem in problems_of_flags(self.extra_args, device):
            raise ValueError(f"SGLang servers: extra_args.{problem}")
        for name in sorted(REFUSED_VARIABLES.keys() & self.environment.keys()):
            raise ValueError(f"SGLang servers: environment.{name}: {REFUSED_VARIABLES[name]}; take it out")

    def check_interpreter(self, device: str, base: Mapping[str, str] | None = None) -> Version:
        """Return the version of SGLang in the servers' interpreter, without importing it.

        Raises ValueError, with the way to install it, when the interpreter, SGLang, or a usable version of it is
        missing.
        """
        if sys.platform != "linux":
            raise ValueError(
                f"SGLang servers: the trainer starts them on Linux only, and this is {sys.platform}; take "
                "rollout.engine=embedded, or rollout.sglang.placement=given with servers on Linux machines"
            )
        python = self.interpreter
        question = "import importlib.metadata as metadata; print(metadata.version('sglang'))"
        environment = server_environment(self, device, os.environ if base is None else base)
        try:
            # Last line: a sitecustomize may greet.
            answer = subprocess.run(
                [python, "-c", question], env=environment, capture_output=True, text=True, timeout=60, check=True
            )
            version = Version(answer.stdout.strip().splitlines()[-1])
        except OSError as error:
            raise ValueError(f"SGLang servers: {python} does not run ({error.strerror}); {INSTALL}") from error
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"SGLang servers: {python} did not say within a minute which SGLang it has") from error
        except (subprocess.CalledProcessError, InvalidVersion, IndexError) as error:
            raise ValueError(f"SGLang servers: {python} has no SGLang; {INSTALL}") from error
        if version < OLDEST_SGLANG:
            raise ValueError(f"SGLang servers: {python} has SGLang {version}, older than {OLDEST_SGLANG}; {INSTALL}")
        return version
