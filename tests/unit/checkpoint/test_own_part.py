"""What a process reads of the matrices that it shares is its own part, and what it holds is bit for bit as if it had
read all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.checkpoint import files as files_module
from tunesmith.checkpoint.files import WeightFiles
from tunesmith.checkpoint.inference_share import load_share_for_inference
from tunesmith.checkpoint.load import CheckpointWeights
from tunesmith.checkpoint.staging import StagedTensors, stored_tensors
from tunesmith.model.decoder import Decoder
from tunesmith.parallel import own_boxes
from tunesmith.parallel.mesh import Dimension, Mesh, Place

# Half of the MLP is three groups of 32, and tears one of 64 and one of 128.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
GPT2 = {"n_embd": 128, "n_head": 4, "n_layer": 1}
FORMATS = (None, "int8", "w8a8", "int4", "int4-g64-sym", "fp8", "nf4", "nf4-double")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class OneOf(Mesh):
    """A place among processes that share a model, of which none is asked for anything."""

    def size(self, dimension: Dimension) -> int:
        return self.world_size if dimension == "tp" else 1

    def index(self, dimension: Dimension) -> int:
        return self.rank if dimension == "tp" else 0

    def group(self, dimension: Dimension) -> Any:
        return None


def held(decoder: Decoder) -> dict[str, Tensor]:
    return {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}


def sizes(quantize: str | None) -> dict[str, int]:
    """NF4 tears no block of 64."""
    return {**SIZES, "intermediate_size": 256} if quantize in ("nf4", "nf4-double") else SIZES


def load(directory: Path, rank: int, quantize: str | None) -> dict[str, Tensor]:
    return held(load_share_for_inference(directory, OneOf(Place(rank, 2, rank), CPU), quantize=quantize))


@pytest.fixture
def num_read(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Values that were read of each tensor."""
    found: dict[str, int] = {}
    read, read_box = WeightFiles.read, WeightFiles.read_box

    def counted(files: WeightFiles, name: str) -> Tensor:
        tensor = read(files, name)
        found[name] = found.get(name, 0) + tensor.numel()
        return tensor

    def counted_box(files: WeightFiles, name: str, box: Any) -> Tensor:
        tensor = read_box(files, name, box)
        if tuple(tensor.shape) != files.shape(name):  # the whole goes through `read`, unless it was read ahead
            found[name] = found.get(name, 0) + tensor.numel()
        return tensor

    monkeypatch.setattr(WeightFiles, "read", counted)
    monkeypatch.setattr(WeightFiles, "read_box", counted_box)
    return found


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_part_that_was_read_is_that_of_a_whole(
    family: str, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every format, some rows at a time; GPT-2 holds [in, out], and query, key and value as one projection."""
    monkeypatch.setattr(own_boxes, "VALUES_AT_ONCE", 192 * 50)
    for quantize in FORMATS if family == "qwen2" else ("int4", "nf4-double"):
        directory = tiny_model_dir(family, **(GPT2 if family == "gpt2" else sizes(quantize)))
        for rank in range(2):
            mine = load(directory, rank, quantize)
            with monkeypatch.context() as context:
                context.setattr(CheckpointWeights, "reads_boxes", lambda *_: False)
                expected = load(directory, rank, quantize)
            assert mine.keys() == expected.keys()
            wrong = [n for n, t in expected.items() if t.dtype != mine[n].dtype or not torch.equal(t, mine[n])]
            assert not wrong, (quantize, rank, wrong)


def test_nothing_else_is_read(tiny_model_dir: Callable[..., Path], num_read: dict[str, int]) -> None:
    for quantize in FORMATS:
        directory = tiny_model_dir("qwen2", **sizes(quantize))
        shapes = {name: WeightFiles(directory).shape(name) for name in WeightFiles(directory).names()}
        num_read.clear()
        load(directory, 1, quantize)
        for name, count in num_read.items():
            whole = torch.Size(shapes[name]).numel()
            is_column = "o_proj" in name or "down_proj" in name
            reads_all = quantize == "nf4-double" or (quantize in ("int8", "w8a8", "fp8", "int4") and is_column)
            if "_proj.weight" not in name or reads_all:
                assert count == whole, (quantize, name)
            elif quantize == "int4-g64-sym" and "down_proj" in name:
                assert count == whole * 2 // 3  # columns 96 to 191, and those that 96 to 127 share a group with
            else:
                assert count == whole // 2, (quantize, name)


def test_parts_are_read_ahead_too(tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on their way to a GPU: threads read, in pieces that end anywhere."""
    directory = tiny_model_dir("qwen2", **SIZES)
    expected = load(directory, 1, "int8")
    monkeypatch.setattr(files_module, "staging_pays", lambda device: True)
    monkeypatch.setattr(
        files_module, "StagedTensors", lambda wanted, device: StagedTensors(wanted, device, buffer_bytes=1000)
    )
    monkeypatch.setattr(WeightFiles, "_slice", lambda *_: pytest.fail("read beside the threads"))
    shapes = {name: place.shape for name, place in stored_tensors(directory / "model.safetensors").items()}
    monkeypatch.setattr(WeightFiles, "shape", lambda _, name: shapes[name])
    monkeypatch.setattr(WeightFiles, "dtype", lambda *_: torch.float32)
    mine = load(directory, 1, "int8")
    assert all(torch.equal(tensor, mine[name]) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "box", [((0, 5), (0, 7)), ((1, 4), (0, 7)), ((0, 5), (2, 6)), ((2, 3), (6, 7)), ((2, 2), (0, 7))]
)
@pytest.mark.parametrize("buffer_bytes", [3, 64])
def test_a_box_is_the_matrixs(box: Any, buffer_bytes: int, tmp_path: Path) -> None:
    matrix = torch.arange(35.0).view(5, 7)
    save_file({"before": torch.zeros(3), "matrix": matrix}, tmp_path / "model.safetensors")
    (top, bottom), (left, right) = box
    expected = matrix[top:bottom, left:right]
    assert torch.equal(WeightFiles(tmp_path).read_box("matrix", box), expected)
    place = stored_tensors(tmp_path / "model.safetensors")["matrix"].part(box)
    with StagedTensors({"part": place}, CPU, threads=2, buffer_bytes=buffer_bytes) as staged:
        assert torch.equal(staged.read("part"), expected)
