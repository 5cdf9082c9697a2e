"""Trackers besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, SwanLab; each an optional package.

A tracker that fails, at the start or later, is dropped with a warning: measurements are in metrics.jsonl anyway.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tunesmith.errors import MissingExtraError

log = logging.getLogger(__name__)


class LogSettings(Protocol):
    """The part of a recipe's log section that is needed here."""

    @property
    def trackers(self) -> Sequence[str]: ...
    @property
    def project(self) -> str: ...


class Tracker(Protocol):
    """One tracker that is running."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers under their names at `step`."""

    def close(self) -> None:
        """Send what is left and end."""


class _TensorBoard:
    def __init__(self, project: str, name: str, directory: Path, config: Mapping[str, Any]) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(log_dir=str(directory / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, global_step=step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, project: str, name: str, directory: Path, config: Mapping[str, Any]) -> None:
        module = importlib.import_module("wandb")
        self._run = module.init(project=project, name=name, dir=str(directory), config=dict(config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, project: str, name: str, directory: Path, config: Mapping[str, Any]) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(project)
        self._mlflow.start_run(run_name=name)
        self._mlflow.log_dict(dict(config), "recipe.json")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _SwanLab:
    def __init__(self, project: str, name: str, directory: Path, config: Mapping[str, Any]) -> None:
        self._swanlab = importlib.import_module("swanlab")
        self._swanlab.init(
            project=project, experiment_name=name, logdir=str(directory / "swanlab"), config=dict(config)
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._swanlab.log(dict(values), step=step)

    def close(self) -> None:
        self._swanlab.finish()


_Maker = Callable[[str, str, Path, Mapping[str, Any]], Tracker]
TRACKERS: Mapping[str, _Maker] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
    "swanlab": _SwanLab,
}
_FAILURES = (Exception,)  # whatever a third party's network or disk can raise


class Trackers:
    """The trackers of one run.

    Args: settings: recipe.log; directory: the run directory; config: shown beside the run, as plain data.
    Attributes: left_out: TensorBoard when it is not installed; failed: what was dropped, and why.
    Raises: MissingExtraError for any other tracker that is asked for and not installed.
    """

    def __init__(
        self,
        settings: LogSettings,
        directory: Path,
        *,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.left_out: list[str] = []
        self.failed: dict[str, str] = {}
        self._running: dict[str, Tracker] = {}
        for kind in dict.fromkeys(settings.trackers):
            self._start(kind, settings.project, name or directory.name, directory, config or {})

    def _start(self, kind: str, project: str, name: str, directory: Path, config: Mapping[str, Any]) -> None:
        try:
            self._running[kind] = TRACKERS[kind](project, name, directory, config)
        except ImportError:
            if kind != "tensorboard":
                self.close()
                raise MissingExtraError(kind, kind) from None
            self.left_out.append(kind)
            log.warning("TensorBoard is not installed, so it is left out: pip install 'tunesmith[tensorboard]'")
        except _FAILURES as error:
            self._drop(kind, error)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Hand the numbers among `values` to every tracker; text, lists and None stay in metrics.jsonl."""
        numbers = {key: float(value) for key, value in values.items() if _is_number(value) and key != "step"}
        for kind in list(self._running):
            self._guarded(kind, lambda tracker: tracker.log(step, numbers))

    def close(self) -> None:
        """End every tracker; again is harmless."""
        for kind in list(self._running):
            self._guarded(kind, lambda tracker: tracker.close())
        self._running.clear()

    def _guarded(self, kind: str, action: Callable[[Tracker], None]) -> None:
        try:
            action(self._running[kind])
        except _FAILURES as error:
            self._drop(kind, error)

    def _drop(self, kind: str, error: Exception) -> None:
        self.failed[kind] = f"{type(error).__name__}: {error}"
        self._running.pop(kind, None)
        log.warning("%s failed and is dropped (metrics.jsonl has everything): %s", kind, self.failed[kind])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
