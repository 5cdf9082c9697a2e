"""Training states on disk: whole or absent, checked, kept, never pickled."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunesmith.checkpoint import sharded, tensor_files
from tunesmith.checkpoint.state import (
    MANIFEST,
    STATE,
    TENSORS,
    TrainingState,
    list_states,
    load_latest,
    load_state,
    save_state,
)
from tunesmith.errors import CheckpointError
from tunesmith.rundir.io import sha256_file, write_json_atomic


def _state(step: int) -> TrainingState:
    tensors = {
        "model.weight": torch.arange(12, dtype=torch.float32).view(3, 4) + step,
        "model.half": torch.linspace(-1, 1, 5).to(torch.bfloat16),
        "optimizer.weight.step": torch.tensor(float(step)),
        "optimizer.weight.codes": torch.arange(7, dtype=torch.uint8),
        "model.view": torch.arange(6.0).view(2, 3).t(),
        "model.empty": torch.zeros(0, 4),
    }
    return TrainingState(step, tensors, {"tokens_seen": 10 * step, "learning_rate": 0.1 + 0.2, "name": "訓練"})


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = save_state(tmp_path, _state(3), keep=2)
    loaded = load_state(path)
    assert loaded.step == 3
    assert loaded.facts == _state(3).facts
    assert loaded.tensors.keys() == _state(3).tensors.keys()
    for name, tensor in _state(3).tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor), name


def test_tensors_are_plain_safetensors_and_slices_are_written(tmp_path: Path) -> None:
    path = save_state(tmp_path, _state(3), keep=2)
    assert torch.equal(load_file(path / TENSORS)["model.weight"], _state(3).tensors["model.weight"])
    entry = json.loads((path / STATE).read_text(encoding="utf-8"))["tensors"]["model.weight"]
    piece = {"file": TENSORS, "key": "model.weight", "slices": [[0, 3], [0, 4]]}
    assert entry == {"global_shape": [3, 4], "dtype": "F32", "pieces": [piece]}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_state(tmp_path, _state(step), keep=2)
    assert [path.name for path in list_states(tmp_path)] == ["step-00000002", "step-00000010"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]


@pytest.mark.parametrize("name", [TENSORS, STATE, MANIFEST])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_state_is_named_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_state(tmp_path, _state(1), keep=2)
    newest = save_state(tmp_path, _state(2), keep=2)
    file = newest / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[:-1] if name != MANIFEST else content[: len(content) // 2])
    else:
        position = content.index(b'"sha256": "') + 15 if name == MANIFEST else len(content) - 3
        content[position] ^= 1
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match="step-00000002"):
        load_state(newest)
    path, loaded = load_latest(tmp_path)
    assert (path.name, loaded.step) == ("step-00000001", 1)
    assert "step-00000002" in caplog.text


def test_none_usable_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is none"):
        load_latest(tmp_path)
    (save_state(tmp_path, _state(1), keep=1) / TENSORS).unlink()
    with pytest.raises(CheckpointError, match="torn"):
        load_latest(tmp_path)


def test_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "SCHEMA_VERSION", 99)
    path = save_state(tmp_path, _state(1), keep=1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 99"):
        load_state(path)


@pytest.mark.parametrize("after_writes", range(4))
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_writes: int) -> None:
    save_state(tmp_path, _state(1), keep=1)
    left = [after_writes]

    def full(file: object, content: bytes) -> None:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        original(file, content)

    original = tensor_files._write_all
    monkeypatch.setattr(tensor_files, "_write_all", full)
    with pytest.raises(OSError, match="No space left"):
        save_state(tmp_path, _state(2), keep=1)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_latest(tmp_path)[1].step == 1


def test_a_state_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    (save_state(tmp_path, _state(2), keep=2) / TENSORS).unlink()
    save_state(tmp_path, _state(2), keep=2)
    assert load_latest(tmp_path)[1].step == 2


def test_a_state_of_the_first_version_is_read(tmp_path: Path) -> None:
    """Before several processes could write one: no pieces, and a manifest without a checksum of its own."""
    path = tmp_path / "step-00000004"
    path.mkdir()
    tensors = {"model.a": torch.randn(4, 3), "rng.torch": torch.arange(5, dtype=torch.uint8)}
    save_file(tensors, path / TENSORS)
    kinds = {"model.a": "F32", "rng.torch": "U8"}
    index = {
        name: {
            "global_shape": list(tensor.shape),
            "dtype": kinds[name],
            "slices": [[0, size] for size in tensor.shape],
            "file": TENSORS,
        }
        for name, tensor in tensors.items()
    }
    content = {"schema": "tunesmith.state", "schema_version": 1, "step": 4, "facts": {"x": 1}, "tensors": index}
    write_json_atomic(path / STATE, content)
    files = {
        name: {"bytes": (path / name).stat().st_size, "sha256": sha256_file(path / name)} for name in (TENSORS, STATE)
    }
    write_json_atomic(path / MANIFEST, {"schema_version": 1, "files": files})
    loaded = load_latest(tmp_path)[1]
    assert (loaded.step, loaded.facts) == (4, {"x": 1})
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_later_state_does_not_crowd_out_the_one_just_written(tmp_path: Path, keep: int) -> None:
    """With keep 1 the state just written was dropped at once in favour of a damaged one of a later step."""
    save_state(tmp_path, _state(1), keep=2)
    (save_state(tmp_path, _state(9), keep=2) / STATE).write_text("torn", encoding="utf-8")
    for step in (3, 5):
        save_state(tmp_path, _state(step), keep=keep)
    assert load_latest(tmp_path)[1].step == 5
    whole = [path.name for path in list_states(tmp_path) if path.name != "step-00000009"]
    assert whole == ["step-00000003", "step-00000005"][-keep:]
