"""The example that trains a module which is no language model; skipped where MNIST's files are absent."""

from __future__ import annotations

import importlib.util
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


def test_idx_files_are_read(example: ModuleType, mnist: Path) -> None:
    images, labels = example.load_mnist(mnist)
    assert images.shape == (len(labels), 1, 28, 28)
    assert (images.min(), images.max()) == (0, 1)
    assert torch.bincount(labels).shape == (10,)
