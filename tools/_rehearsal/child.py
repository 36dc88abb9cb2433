"""Process of one rank: starts itself again on the null GPU, calls a function there, and writes its result as JSON.

python -m _rehearsal.child '{"function": "module:name", "arguments": [...], "rank": 0, "world": 16, "gpu": "h200",
                             "result": "result.json"}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from _rehearsal.errors import RehearsalError
from _rehearsal.launch import DEVICES, ROOT, interpreter, replace_process


def call(
    function: Callable[..., Any] | str,
    arguments: Sequence[Any],
    *,
    rank: int = 0,
    world: int = 1,
    gpu: str = "h200",
    timeout_s: float = 600.0,
    python: Path | None = None,
    folders: Sequence[Path] = (),
) -> Any:
    """Return what `function(null_gpu, *arguments)` returns as rank `rank` of `world`, in a process on the null GPU.

    function: of a module's top level, or its `module:name`. arguments, result: JSON values. folders: more of
    PYTHONPATH. Raises RehearsalError with the end of the process's output when it fails.
    """
    paths = [str(ROOT), str(ROOT / "tools"), *map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
        asked = {"function": name, "arguments": list(arguments)}
        asked |= {"rank": rank, "world": world, "gpu": gpu, "result": str(result)}
        ended = subprocess.run(
            [python or interpreter(), "-m", "_rehearsal.child", json.dumps(asked)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if ended.returncode or not result.exists():
            raise RehearsalError(f"rank {rank} of {world} did not end well:\n{(ended.stdout + ended.stderr)[-6000:]}")
        return json.loads(result.read_text())


def main() -> None:
    """Call the function of the command line."""
    asked = json.loads(sys.argv[1])
    replace_process(DEVICES[asked["gpu"]])
    try:
        Path(asked["result"]).write_text(json.dumps(_on_device(asked)))
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without the end of NCCL's threads, which would wait for other ranks


def _on_device(asked: dict[str, Any]) -> Any:
    import torch

    from _rehearsal.device import NullGpu
    from _rehearsal.host_values import answered
    from _rehearsal.world import one_rank

    # cuDNN is the real library, and wants a real device.
    torch.backends.cuda.enable_cudnn_sdp(False)
    module, name = asked["function"].split(":")
    gpu = NullGpu()
    with one_rank(asked["rank"], asked["world"]) as store, answered(gpu):
        gpu.group_of = store.group_of
        return getattr(import_module(module), name)(gpu, *asked["arguments"])


if __name__ == "__main__":
    main()
