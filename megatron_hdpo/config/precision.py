"""The precision of a run: what `dtype: auto` becomes, and the line that the console prints about it.

After `resolve`, every setting names a type; only this module and the recipe's schema know `auto`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_hdpo.checkpoint.store import latest_checkpoint, read_state
from megatron_hdpo.config.recipe import Recipe
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.config import DTYPES
from megatron_hdpo.model.dtype_speed import Measure, measure_bfloat16


@dataclass(frozen=True)
class PrecisionChoice:
    """The model's precision, and the text about it for the console.

    line: the chosen precision and the reason. warning: names the keys that ask for bfloat16 where it is slow.
    """

    dtype: str
    line: str
    warning: str | None = None


def choose_precision(
    recipe: Recipe,
    architecture: Architecture,
    device: str,
    begun: str | None = None,
    measure: Measure = measure_bfloat16,
) -> PrecisionChoice:
    """Choose the model's precision on this machine.

    device: cuda or cpu. begun: the precision in which the run in the recipe's output folder began; `auto` keeps it.
    measure: compares the speed of bfloat16 with float32 on this CPU; called at most once, and only where the result
    matters.
    """
    asked, on_cpu = recipe.model.dtype, device == "cpu"
    speed = None
    dtype: str
    if asked != "auto":
        dtype, reason = asked, f"model.dtype={asked}"
    elif begun is not None:
        dtype, reason = begun, "this run began in it"
    elif key := _needs_bfloat16(recipe):
        dtype, reason = "bfloat16", f"{key} needs it"
    elif not on_cpu:
        dtype, reason = "bfloat16", "on a GPU"
    else:
        speed = measure(*_layer_sizes(recipe, architecture))
        dtype, reason = "float32" if speed.slow else "bfloat16", str(speed)
    line = f"precision: {dtype} ({reason}){_engine_note(recipe, dtype)}"
    keys = _bfloat16_keys(recipe, dtype) if on_cpu else []
    if speed is None and keys:
        speed = measure(*_layer_sizes(recipe, architecture))
    if speed is None or not speed.slow or not keys:
        return PrecisionChoice(dtype, line)
    remedy = "dtype=auto would take float32"
    if asked == "auto" and begun is not None:
        remedy = f"this run began in it and keeps it; {remedy} in another output folder"
    return PrecisionChoice(dtype, line, f"{' and '.join(keys)}: {speed}; {remedy}")


def resolve(recipe: Recipe, dtype: str) -> Recipe:
    """Return the recipe with `dtype` as the model's precision, and with an engine's `auto` replaced by it."""
    rollout = recipe.rollout
    embedded, servers = rollout.embedded, rollout.sglang.servers
    if embedded.dtype == "auto":
        embedded = embedded.model_copy(update={"dtype": dtype})
    if servers.dtype == "auto":
        servers = servers.model_copy(update={"dtype": dtype})
    sglang = rollout.sglang.model_copy(update={"servers": servers})
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"dtype": dtype}),
            "rollout": rollout.model_copy(update={"embedded": embedded, "sglang": sglang}),
        }
    )


def begun_in(run_dir: Path) -> str | None:
    """Return the precision in which the run in a folder began; None when the folder holds no run.

    It is read from the newest checkpoint; before the first checkpoint, and for checkpoints of older versions, from the
    saved recipe. Raises CheckpointError when the checkpoint cannot be read.
    """
    latest = latest_checkpoint(run_dir)
    if latest is not None and (dtype := read_state(latest).dtype) is not None:
        return dtype
    saved = run_dir / "recipe.yaml"
    if not (run_dir / "checkpoints").is_dir() or not saved.is_file():
        return None
    tree = yaml.safe_load(saved.read_text(encoding="utf-8"))
    model = tree.get("model") if isinstance(tree, dict) else None
    dtype = model.get("dtype") if isinstance(model, dict) else None
    return dtype if dtype in DTYPES else None


def _layer_sizes(recipe: Recipe, architecture: Architecture) -> tuple[int, int]:
    """Return the hidden size and the FFN channels of a rank's layer, or of one of its experts."""
    if architecture.num_experts:
        return architecture.hidden_size, architecture.expert_ffn_size // recipe.parallel.expert_tensor
    return architecture.hidden_size, architecture.ffn_size // recipe.parallel.tensor


def _needs_bfloat16(recipe: Recipe) -> str | None:
    """Return the key that works only with bfloat16 weights; None when the recipe has no such key."""
    if recipe.model.fp8 is not None:
        return "model.fp8"
    sections = {"optimizer": recipe.optimizer, "warmup.optimizer": recipe.warmup.optimizer}
    return next((f"{key}.offload" for key, section in sections.items() if section.offload), None)


def _engine(recipe: Recipe) -> tuple[str, str] | None:
    """Return key and value of the engine's precision; None when this run does not choose it."""
    rollout = recipe.rollout
    if rollout.engine == "embedded":
        return "rollout.embedded.dtype", rollout.embedded.dtype
    if rollout.sglang.placement == "given":
        return None
    return "rollout.sglang.servers.dtype", rollout.sglang.servers.dtype


def _engine_note(recipe: Recipe, dtype: str) -> str:
    engine = _engine(recipe)
    if engine is None or engine[1] in ("auto", dtype):
        return ""
    return f", engine: {engine[1]} ({engine[0]})"


def _bfloat16_keys(recipe: Recipe, dtype: str) -> list[str]:
    """Return the settings that make this run compute in bfloat16 without a measurement of its speed."""
    keys = ["model.dtype=bfloat16"] if dtype == "bfloat16" else []
    engine = _engine(recipe)
    if engine is not None and engine[1] == "bfloat16":
        keys.append(f"{engine[0]}=bfloat16")
    return keys
