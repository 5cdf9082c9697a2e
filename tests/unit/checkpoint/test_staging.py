"""Tensors read in the background are those of the files, in any cut, and errors arrive where they are used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tunesmith.checkpoint import files as files_module
from tunesmith.checkpoint import staging
from tunesmith.checkpoint.files import WeightFiles
from tunesmith.checkpoint.load import load_decoder
from tunesmith.checkpoint.staging import StagedTensors, stored_tensors
from tunesmith.errors import ModelError

CPU = torch.device("cpu")


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"a": (3, 5), "b": (), "c": (0, 4), "d": (17, 33), "e": (1,), "f": (64,)}
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return {name: torch.randn(shape).to(dtypes[i % 3]) for i, (name, shape) in enumerate(shapes.items())}


@pytest.fixture
def path(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    save_file({**tensors, "whole": torch.arange(4)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(("buffer_bytes", "threads", "ahead_bytes"), [(7, 3, 1), (64, 1, 100), (4096, 8, 10**6)])
def test_every_tensor_is_the_files(
    path: Path, tensors: dict[str, torch.Tensor], buffer_bytes: int, threads: int, ahead_bytes: int
) -> None:
    stored = stored_tensors(path)
    assert set(stored) == set(tensors)
    options = {"threads": threads, "buffer_bytes": buffer_bytes, "ahead_bytes": ahead_bytes}
    with StagedTensors(stored, CPU, **options) as staged:
        for name in stored:
            found = staged.read(name)
            assert found.dtype == tensors[name].dtype
            assert found.shape == tensors[name].shape
            assert torch.equal(found, tensors[name])
            assert name not in staged


def test_no_more_is_held_than_allowed(path: Path) -> None:
    stored = stored_tensors(path)
    with StagedTensors(stored, CPU, ahead_bytes=1) as staged:
        assert len(staged._coming) == 1
        staged.read(next(iter(stored)))
        assert len(staged._coming) == 1


def test_a_file_that_ends_early_is_said_where_its_tensor_is_asked_for(path: Path) -> None:
    stored = stored_tensors(path)
    with path.open("r+b") as file:
        file.truncate(max(place.offset for place in stored.values() if place.num_bytes))
    with StagedTensors(stored, CPU) as staged, pytest.raises(ModelError, match="ends too early"):
        for name in stored:
            staged.read(name)


def test_a_file_that_is_gone_is_said(path: Path) -> None:
    stored = stored_tensors(path)
    path.unlink()
    with StagedTensors(stored, CPU) as staged, pytest.raises(ModelError, match=r"model\.safetensors can't be read"):
        for name in stored:
            staged.read(name)


@pytest.mark.parametrize("content", [b"", b"\x05", b"\xff" * 8 + b"{", b"\x02" + b"\0" * 7 + b"[]"])
def test_a_torn_header_is_said(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="torn or no safetensors file"):
        stored_tensors(path)


def test_leaving_early_ends_the_threads(path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), StagedTensors(stored_tensors(path), CPU, buffer_bytes=7):
        raise KeyboardInterrupt
    assert threading.active_count() == before


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mixtral"])
def test_a_decoder_is_the_same(
    family: str, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model_dir(family)
    plain = load_decoder(directory).state_dict()
    read: list[str] = []
    inner = StagedTensors.read

    def noted(self: StagedTensors, name: str) -> torch.Tensor:
        read.append(name)
        return inner(self, name)

    monkeypatch.setattr(files_module, "staging_pays", lambda device: True)
    monkeypatch.setattr(StagedTensors, "read", noted)
    staged = load_decoder(directory).state_dict()
    assert set(read) <= set(WeightFiles(directory).names())
    assert len(read) > 10
    assert plain.keys() == staged.keys()
    assert all(torch.equal(plain[name], staged[name]) for name in plain)


def test_it_pays_on_a_gpu_only() -> None:
    assert staging.staging_pays(torch.device("cuda", 1))
    assert not staging.staging_pays(CPU)
