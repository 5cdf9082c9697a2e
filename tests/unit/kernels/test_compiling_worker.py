"""What every program that compiles for others does: it says nothing where there is no GPU, and counts what it did."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tunesmith.kernels import compiling_worker
from tunesmith.kernels.compiling_worker import device_index, num_processes, serve, work

H200 = (9, 0, 132)


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:3", 3)])
def test_the_device_is_the_one_that_is_named(device: str, index: int) -> None:
    assert device_index(device) == index


def test_at_least_one_process_works() -> None:
    assert 1 <= num_processes() <= compiling_worker._MOST_PROCESSES


def test_what_is_found_is_compiled_for_the_chip() -> None:
    seen: list[Any] = []

    def find(request: dict[str, Any], chip: Any) -> list[Any]:
        seen.append((request, chip.capability, chip.num_processors))
        return []

    answer = work(find, {"a": 1}, H200, 2)
    assert seen == [({"a": 1}, (9, 0), 132)]
    assert (answer["kernels"], answer["failed"]) == (0, [])
    assert answer["duration_s"] >= 0


@pytest.mark.parametrize("failed", [[], ["_kernel"]])
def test_the_marker_is_made_once_all_is_compiled(
    failed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"kernels": 2, "failed": failed}
    monkeypatch.setattr(compiling_worker, "chip_numbers", lambda index: H200)
    monkeypatch.setattr(compiling_worker, "work", lambda *_: answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"marker": str(tmp_path / "marker")})))
    serve(lambda request, chip: [], lambda request: "auto")
    assert json.loads(capsys.readouterr().out) == answer
    assert (tmp_path / "marker").exists() == (not failed)


def test_nothing_found_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a model that is not fetched yet: the marker said for good that all was compiled."""
    monkeypatch.setattr(compiling_worker, "chip_numbers", lambda index: H200)
    monkeypatch.setattr(compiling_worker, "work", lambda *_: {"kernels": 0, "failed": []})
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"marker": str(tmp_path / "none" / "marker")})))
    serve(lambda request, chip: [], lambda request: "auto")
    assert json.loads(capsys.readouterr().out)["kernels"] == 0
    assert not (tmp_path / "none").exists()
