"""One call per step that writes the metrics to all destinations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_hdpo.tracking.backends import (
    Backend,
    BackendMissing,
    MLflowBackend,
    TensorBoardBackend,
    WandbBackend,
)
from megatron_hdpo.tracking.config import TrackingConfig
from megatron_hdpo.tracking.console import Console
from megatron_hdpo.tracking.metrics import MetricsWriter, clean
from megatron_hdpo.types.secrets import without_passwords


class Tracker:
    """Writer of metrics.jsonl and of its copies in the recipe's backends.

    metrics.jsonl is the record: a failure to write it ends the run. A backend that fails is reported once on the
    console and left out from then on; only a missing library raises (BackendMissing), at the start. resume_step: as for
    `MetricsWriter`. enabled: false on every rank but 0: nothing is opened or written. As a context manager it closes
    itself, and reports to the backends whether the run failed.
    """

    def __init__(
        self,
        config: TrackingConfig,
        output_dir: str | Path,
        console: Console,
        *,
        resume_step: int | None = None,
        enabled: bool = True,
    ) -> None:
        self._console = console
        self._backends: list[Backend] = []
        self.writer: MetricsWriter | None = None
        if not enabled:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name, make in _chosen(config, folder, resume_step):
            self._open(name, make)
        self.writer = MetricsWriter(folder, resume_step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of a step. Raises as `MetricsWriter.write` does."""
        if self.writer is None:
            return
        self.writer.write(step, metrics)
        finite = {name: value for name, value in clean(metrics).items() if math.isfinite(value)}
        self._each(lambda backend: backend.log(step, finite))

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Give the backends the resolved recipe, as nested plain data."""
        self._each(lambda backend: backend.log_config(config))

    def close(self, failed: bool = False) -> None:
        """Close everything. Idempotent."""
        if self.writer is not None:
            self.writer.close()
        self._each(lambda backend: backend.close(failed))
        self._backends = []

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _open(self, name: str, make: Callable[[], Backend]) -> None:
        try:
            self._backends.append(make())
        except BackendMissing:
            raise
        except Exception as error:
            self._report(name, error)

    def _each(self, call: Callable[[Backend], None]) -> None:
        for backend in list(self._backends):
            try:
                call(backend)
            except Exception as error:
                self._backends.remove(backend)
                self._report(backend.name, error)

    def _report(self, name: str, error: Exception) -> None:
        reason = without_passwords(f"{type(error).__name__}: {error}")[:500]
        self._console.warn(f"{name} failed and is off from here on; metrics.jsonl goes on ({reason})")


def _chosen(config: TrackingConfig, folder: Path, resume_step: int | None) -> list[tuple[str, Callable[[], Backend]]]:
    chosen: list[tuple[str, Callable[[], Backend]]] = []
    if config.writes_tensorboard:
        chosen.append((TensorBoardBackend.name, lambda: TensorBoardBackend(folder, resume_step)))
    if (wandb := config.wandb) is not None:
        chosen.append((WandbBackend.name, lambda: WandbBackend(wandb, folder, resume_step)))
    if (mlflow := config.mlflow) is not None:
        chosen.append((MLflowBackend.name, lambda: MLflowBackend(mlflow, folder, resume_step)))
    return chosen
