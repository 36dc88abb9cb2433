"""TensorBoard, Weights & Biases and MLflow: optional copies of metrics.jsonl.

Each class uses one library, imports it when it is opened, and raises any error of that library; the `Tracker` handles
it. Backends get finite numbers only.
"""

from __future__ import annotations

import importlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from megatron_hdpo.tracking.config import MLflowConfig, WandbConfig
from megatron_hdpo.types.errors import UserError

IDS_FILE = "tracking.json"
"""Holds the run ids that W&B and MLflow gave, so that a resumed run goes on in the same one."""

_MLFLOW_PARAM_LENGTH = 500
_MLFLOW_BATCH = 100


class BackendMissing(UserError, ImportError):
    """The recipe asks for a backend whose library cannot be imported; the message says how to install it."""


class Backend(Protocol):
    """A destination that metrics are copied to."""

    name: str

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the finite numbers of a step."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Record the resolved recipe (nested plain data)."""

    def close(self, failed: bool) -> None:
        """Send what is buffered and mark the run there as finished or failed."""


class TensorBoardBackend:
    """Event files in `<output_dir>/tensorboard`; steps after `resume_step` are purged from the view."""

    name = "TensorBoard"

    def __init__(self, output_dir: Path, resume_step: int | None) -> None:
        tensorboard = _import("torch.utils.tensorboard", "tensorboard", "tracking.tensorboard=false")
        purge = 0 if resume_step is None else resume_step + 1
        self._writer = tensorboard.SummaryWriter(str(output_dir / "tensorboard"), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_config(self, config: Mapping[str, Any]) -> None:
        text = json.dumps(config, indent=2, default=str)
        self._writer.add_text("recipe", "".join(f"    {line}\n" for line in text.splitlines()))

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandbBackend:
    """A Weights & Biases run whose x axis is our step, so that a resumed run may go back to an earlier step."""

    name = "Weights & Biases"

    def __init__(self, config: WandbConfig, output_dir: Path, resume_step: int | None) -> None:
        wandb = _import("wandb", "wandb", "tracking.wandb=null")
        self._run = wandb.init(
            dir=str(output_dir),
            id=_saved_id(output_dir, "wandb") if resume_step is not None else None,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(console="off"),  # the console's bars are noise in a log
            **config.model_dump(),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        _save_id(output_dir, "wandb", self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._run.config.update(dict(config), allow_val_change=True)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflowBackend:
    """An MLflow run. Names there allow no `@`: pass@4 becomes pass_at_4."""

    name = "MLflow"

    def __init__(self, config: MLflowConfig, output_dir: Path, resume_step: int | None) -> None:
        # The full package is needed for a database such as sqlite, mlflow-skinny will do for a server.
        self._mlflow = _import("mlflow", "mlflow", "tracking.mlflow=null")
        self._client = self._mlflow.MlflowClient(tracking_uri=config.uri)
        self._id = _saved_id(output_dir, "mlflow") if resume_step is not None else None
        if self._id is None:
            found = self._client.get_experiment_by_name(config.experiment)
            experiment = found.experiment_id if found else self._client.create_experiment(config.experiment)
            self._id = self._client.create_run(experiment, run_name=config.run_name).info.run_id
            _save_id(output_dir, "mlflow", self._id)
        else:
            self._client.update_run(self._id, status="RUNNING")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now, metric = int(time.time() * 1000), self._mlflow.entities.Metric
        items = [metric(mlflow_name(name), float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self._id, metrics=items)

    def log_config(self, config: Mapping[str, Any]) -> None:
        known = self._client.get_run(
            self._id
        ).data.params  # MLflow refuses to change one; a resumed run keeps the first
        flat = {mlflow_name(key): str(value)[:_MLFLOW_PARAM_LENGTH] for key, value in flatten(config)}
        new = [self._mlflow.entities.Param(key, value) for key, value in flat.items() if key not in known]
        for start in range(0, len(new), _MLFLOW_BATCH):
            self._client.log_batch(self._id, params=new[start : start + _MLFLOW_BATCH])

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def mlflow_name(name: str) -> str:
    """Return `name` in the characters that MLflow allows."""
    return re.sub(r"[^\w./ -]", "_", name.replace("@", "_at_"))


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every leaf of nested mappings."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _import(module: str, package: str, off: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendMissing(
            f"the recipe asks for {package}, which cannot be imported ({error}): `pip install {package}`, or set {off}"
        ) from error


def _ids(output_dir: Path) -> dict[str, str]:
    path = output_dir / IDS_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def _saved_id(output_dir: Path, backend: str) -> str | None:
    return _ids(output_dir).get(backend)


def _save_id(output_dir: Path, backend: str, run_id: str) -> None:
    text = json.dumps({**_ids(output_dir), backend: run_id}, indent=2)
    (output_dir / IDS_FILE).write_text(text + "\n")
