"""Trackers: TensorBoard for real, the others by stand-ins; a failing one never stops a run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tunesmith.errors import MissingExtraError
from tunesmith.recipe.schema import LogSection
from tunesmith.watch import trackers
from tunesmith.watch.trackers import Trackers


class _Recorder:
    """A tracker that keeps what it is told, and fails when it is told to."""

    def __init__(self, project: str, name: str, directory: Path, config: Any) -> None:
        self.made_with = (project, name, directory, dict(config))
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = 0
        self.fails = False

    def log(self, step: int, values: Any) -> None:
        if self.fails:
            raise ConnectionError("no network")
        self.rows.append((step, dict(values)))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[_Recorder]:
    made: list[_Recorder] = []

    def make(*arguments: Any) -> _Recorder:
        made.append(_Recorder(*arguments))
        return made[-1]

    monkeypatch.setattr(trackers, "TRACKERS", {**trackers.TRACKERS, "wandb": make, "mlflow": make})
    return made


def test_tensorboard_writes_what_it_was_told(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    watched = Trackers(LogSection(trackers=["tensorboard"]), tmp_path)
    for step in (1, 2):
        watched.log(step, {"loss": 3.0 - step, "step": step, "note": "text", "mfu": None, "flag": True})
    watched.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]


def test_numbers_reach_every_tracker(recorder: list[_Recorder], tmp_path: Path) -> None:
    watched = Trackers(LogSection(trackers=["wandb", "mlflow"], project="p"), tmp_path, name="n", config={"a": 1})
    watched.log(3, {"step": 3, "loss": 1, "text": "x", "none": None, "yes": True})
    watched.close()
    watched.close()
    for one in recorder:
        assert one.made_with == ("p", "n", tmp_path, {"a": 1})
        assert one.rows == [(3, {"loss": 1.0})]
        assert one.closed == 1
    assert len(recorder) == 2


def test_a_tracker_that_fails_is_dropped_and_the_others_go_on(
    recorder: list[_Recorder], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Trackers(LogSection(trackers=["wandb", "mlflow"]), tmp_path)
    recorder[0].fails = True
    with caplog.at_level(logging.WARNING):
        watched.log(1, {"loss": 1.0})
        watched.log(2, {"loss": 1.0})
    assert watched.failed == {"wandb": "ConnectionError: no network"}
    assert len(recorder[1].rows) == 2
    assert caplog.text.count("wandb failed and is dropped") == 1


def test_a_tracker_that_can_not_start_is_dropped(
    recorder: list[_Recorder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A service that was not reachable ended the run before its first step, after everything had been loaded."""

    def refuse(*_: Any) -> _Recorder:
        raise ConnectionError("no network")

    monkeypatch.setattr(trackers, "TRACKERS", {**trackers.TRACKERS, "wandb": refuse})
    watched = Trackers(LogSection(trackers=["wandb", "mlflow"]), tmp_path)
    watched.log(1, {"loss": 2.0})
    watched.close()
    assert watched.failed == {"wandb": "ConnectionError: no network"}
    assert [made.rows for made in recorder] == [[(1, {"loss": 2.0})]]
    assert "wandb failed" in caplog.text


def test_tensorboard_that_is_missing_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING):
        watched = Trackers(LogSection(), tmp_path)
    assert watched.left_out == ["tensorboard"]
    assert "pip install 'tunesmith[tensorboard]'" in caplog.text


@pytest.mark.parametrize("name", ["wandb", "mlflow", "swanlab"])
def test_another_tracker_that_is_missing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'tunesmith\[{name}\]'"):
        Trackers(LogSection(trackers=[name]), tmp_path)


class _Calls(ModuleType):
    """A module whose every function records its call."""

    def __init__(self) -> None:
        super().__init__("calls")
        self.calls: list[tuple[str, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> _Calls:
            self.calls.append((name, args, kwargs))
            return self

        return call


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wandb", ["init", "log", "finish"]),
        ("mlflow", ["set_experiment", "start_run", "log_dict", "log_metrics", "end_run"]),
        ("swanlab", ["init", "log", "finish"]),
    ],
)
def test_each_service_is_called_as_it_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: list[str]
) -> None:
    service = _Calls()
    monkeypatch.setitem(sys.modules, name, service)
    watched = Trackers(LogSection(trackers=[name], project="p"), tmp_path, name="n", config={"a": 1})
    watched.log(7, {"loss": 0.5})
    watched.close()
    assert [call[0] for call in service.calls] == expected
    logged = next(call for call in service.calls if call[0] in ("log", "log_metrics"))
    assert logged == (logged[0], ({"loss": 0.5},), {"step": 7})
    assert watched.failed == {}
