"""The example that trains a module which is no language model; skipped where MNIST's files are absent."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tunesmith.rundir.io import read_jsonl

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "mnist_cnn.py"


@pytest.fixture(scope="module")
def mnist(data_dir: Path) -> Path:
    folder = data_dir / "mnist"
    if not any(folder.glob("*images-idx3-ubyte*")):
        pytest.skip("MNIST's idx files are absent from the test data")
    return folder


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mnist_cnn", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mnist_cnn"] = module
    spec.loader.exec_module(module)
    return module


def test_a_cnn_is_trained_saved_evaluated_and_a_prediction_drawn(
    example: ModuleType, mnist: Path, tmp_path: Path
) -> None:
    result = example.run(mnist, tmp_path, steps=100)
    assert result.accuracy > 0.9
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["event"] for row in rows].count("step") == 100
    again = example.run(mnist, tmp_path, steps=100)  # nothing is left to do: the checkpoint is what is evaluated
    assert again.accuracy == result.accuracy
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == len(rows)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_two_processes_by_torchrun_train_it_too(mnist: Path, tmp_path: Path, strategy: str) -> None:
    """Stopped after 60 steps and gone on with; the first process alone evaluates, draws and prints."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    for steps in ("60", "100"):
        options = [str(mnist), "--out", str(tmp_path), "--strategy", strategy, "--steps", steps]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([*start, *options], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
    assert json.loads(line)["test_accuracy"] > 0.9
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl") if row["event"] == "step"] == [*range(1, 101)]
    assert (tmp_path / "ranks" / "rank-1" / "metrics.jsonl").is_file()


def test_idx_files_are_read(example: ModuleType, mnist: Path) -> None:
    images, labels = example.load_mnist(mnist)
    assert images.shape == (len(labels), 1, 28, 28)
    assert (images.min(), images.max()) == (0, 1)
    assert torch.bincount(labels).shape == (10,)
