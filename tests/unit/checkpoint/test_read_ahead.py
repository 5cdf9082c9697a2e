"""Weights are read ahead where there are any, and nothing that goes wrong there is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.checkpoint import read_ahead as module
from tunesmith.checkpoint.read_ahead import read_ahead
from tunesmith.errors import ModelError
from tunesmith.recipe.schema import ModelSection


def test_every_file_of_weights_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.safetensors", "b.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"x" * 10)
    sizes: list[int] = []
    monkeypatch.setattr(module.os, "posix_fadvise", lambda fd, *_: sizes.append(module.os.fstat(fd).st_size))
    thread = read_ahead(ModelSection(path=str(tmp_path)))
    assert thread is not None
    thread.join()
    assert sizes == [10, 10]


def test_random_weights_and_weights_that_do_not_fit_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 10)
    assert read_ahead(ModelSection(path=str(tmp_path), weights="random")) is None
    monkeypatch.setattr(module, "available_memory_bytes", lambda: 19)
    assert read_ahead(ModelSection(path=str(tmp_path))) is None


def test_a_file_that_is_gone_is_no_error(tmp_path: Path) -> None:
    module._advise([tmp_path / "gone.safetensors"])


def test_no_such_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        read_ahead(ModelSection(path=str(tmp_path / "none")))
