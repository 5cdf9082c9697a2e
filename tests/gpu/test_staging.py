"""On a GPU: staged tensors are the files', whatever else the device does, and come faster than from a mapped file."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tunesmith.checkpoint.staging import StagedTensors, stored_tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda", 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(1 + 977 * i, 1024, generator=generator).bfloat16() for i in range(40)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("ahead_bytes", [1, 2**26, None])
def test_every_tensor_is_the_files(path: Path, ahead_bytes: int | None) -> None:
    stored = stored_tensors(path)
    noise = torch.zeros(2**24, device=GPU)
    with StagedTensors(stored, GPU, ahead_bytes=ahead_bytes) as staged, safe_open(path, "pt") as file:
        for name in stored:
            found = staged.read(name)
            noise = noise + found.float().mean()  # what is given back is taken again while copies are under way
            assert torch.equal(found.cpu(), file.get_tensor(name))


def test_it_is_faster_than_a_mapped_file(path: Path) -> None:
    stored = stored_tensors(path)
    seconds: dict[str, list[float]] = {"mapped": [], "staged": []}
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        with safe_open(path, "pt", device="cuda:0") as file:
            for name in stored:
                file.get_tensor(name)
        torch.cuda.synchronize()
        seconds["mapped"].append(time.perf_counter() - began)
        began = time.perf_counter()
        with StagedTensors(stored, GPU) as staged:
            for name in stored:
                staged.read(name)
            torch.cuda.synchronize()
        seconds["staged"].append(time.perf_counter() - began)
    print({name: round(path.stat().st_size / min(took) / 1e9, 2) for name, took in seconds.items()}, "GB/s")
    assert min(seconds["staged"]) < min(seconds["mapped"])
