"""safetensors files: the library's bytes, and any box of any tensor."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tunesmith.checkpoint.tensor_files import TensorFile, raw_bytes, slot_of, write_file
from tunesmith.errors import CheckpointError


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(4, 4),
        "b": torch.arange(3),
        "半": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(2.5),
        "view": torch.randn(3, 4).t(),
        "empty": torch.zeros(0, 4),
        "codes": torch.arange(7, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
    }
    path = tmp_path / "x.safetensors"
    slots = [slot_of(name, tensor) for name, tensor in tensors.items()]
    done = write_file(path, slots, (raw_bytes(tensor) for tensor in tensors.values()), {"format": "pt"})
    assert (done.num_bytes, done.sha256) == (path.stat().st_size, sha256(path.read_bytes()).hexdigest())
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert raw_bytes(loaded[name]) == raw_bytes(tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("data", [[b"123"], [b"1234", b"56789"]])
def test_other_bytes_than_announced(tmp_path: Path, data: list[bytes]) -> None:
    with pytest.raises(CheckpointError, match="were announced"):
        write_file(tmp_path / "x", [slot_of("a", torch.zeros(2))], data)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_box_of_what_the_library_writes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=0, max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64]))
    box = []
    for size in shape:
        start = data.draw(st.integers(0, size))
        box.append((start, data.draw(st.integers(start, size))))
    tensor = (torch.randn(shape) * 50).to(dtype)
    path = tmp_path_factory.mktemp("box") / "x.safetensors"
    save_file({"first": torch.ones(3, dtype=torch.uint8), "w": tensor}, path)
    expected = tensor[tuple(slice(a, b) for a, b in box)]
    room = torch.zeros([*[b - a for a, b in box], 2], dtype=dtype)
    for target in (torch.zeros_like(expected, memory_format=torch.contiguous_format), _inside(expected)):
        TensorFile(path).read_into("w", tuple(box), target)
        assert torch.equal(target, expected)
    assert not room.any()


def _inside(expected: torch.Tensor) -> torch.Tensor:
    """Room in the middle of a larger tensor: rows do not lie behind each other."""
    if expected.dim() == 0:
        return torch.zeros_like(expected)
    larger = torch.zeros([size + 2 for size in expected.shape], dtype=expected.dtype)
    return larger[tuple(slice(1, size + 1) for size in expected.shape)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"\xff" * 8,
        (5).to_bytes(8, "little") + b"{",
        (2).to_bytes(8, "little") + b"[]",
        (7).to_bytes(8, "little") + b'{"a":1}',
    ],
)
def test_what_is_no_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "torn.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"torn.safetensors is torn"):
        TensorFile(path)


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(100)}, path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ends too early"):
        file.read_into("w", ((0, 100),), torch.zeros(100))
