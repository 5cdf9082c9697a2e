"""Any box of a tensor from any pieces; an index that its files contradict is found out."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.checkpoint.agreement import checkpoint_group
from tunesmith.checkpoint.manifest import STATE, read_manifest, write_manifest
from tunesmith.checkpoint.sharded import save_shards
from tunesmith.checkpoint.shards import Shard, as_index, whole
from tunesmith.checkpoint.state import load_latest, load_state
from tunesmith.checkpoint.tensor_files import FileSum
from tunesmith.errors import CheckpointError
from tunesmith.rundir.io import sha256_file

Change = Callable[[dict[str, Any]], None]


def saved(folder: Path, step: int = 1) -> Path:
    """A matrix in four boxes over several files, and a vector."""
    matrix = torch.arange(35.0).view(7, 5) * step
    boxes = [((0, 3), (0, 5)), ((3, 7), (0, 2)), ((3, 5), (2, 5)), ((5, 7), (2, 5))]
    shards = [Shard("model.w", matrix[as_index(box)], (7, 5), box) for box in boxes]
    shards.append(whole("model.v", torch.ones(4)))
    return save_shards(folder, step, shards, {}, keep=3, file_bytes=40)


def test_boxes_across_pieces(tmp_path: Path) -> None:
    tensors = load_state(saved(tmp_path)).stored
    matrix, generator = torch.arange(35.0).view(7, 5), random.Random(0)
    for _ in range(100):
        rows, columns = (sorted(generator.randint(0, size) for _ in range(2)) for size in (7, 5))
        expected = matrix[rows[0] : rows[1], columns[0] : columns[1]]
        assert torch.equal(tensors.read("model.w", [rows, columns]), expected)
    assert ("model.w" in tensors, "model.x" in tensors, len(tensors)) == (True, False, 2)
    with pytest.raises(KeyError):
        tensors["model.x"]


def no_file(index: dict[str, Any]) -> None:
    index["model.v"]["pieces"][0]["file"] = "other.safetensors"


def no_key(index: dict[str, Any]) -> None:
    index["model.v"]["pieces"][0]["key"] = "model.u"


def other_shape(index: dict[str, Any]) -> None:
    index["model.v"] = {
        **index["model.v"],
        "global_shape": [2],
        "pieces": [{**index["model.v"]["pieces"][0], "slices": [[0, 2]]}],
    }


def other_dtype(index: dict[str, Any]) -> None:
    index["model.v"]["dtype"] = "I32"


def unknown_dtype(index: dict[str, Any]) -> None:
    index["model.v"]["dtype"] = "F31"


def lost_piece(index: dict[str, Any]) -> None:
    index["model.w"]["pieces"].pop()


def twice(index: dict[str, Any]) -> None:
    index["model.w"]["pieces"].append(index["model.w"]["pieces"][0])


def swapped(index: dict[str, Any]) -> None:
    pieces = index["model.w"]["pieces"]
    pieces[0]["slices"], pieces[1]["slices"] = pieces[1]["slices"], pieces[0]["slices"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_file, "names other.safetensors, which its manifest lacks"),
        (no_key, "names model.u, but .* has no such tensor"),
        (other_shape, r"has it as F32 \[4\], not \[2\]"),
        (other_dtype, "has it as F32"),
        (unknown_dtype, "index of model.v can't be read"),
        (lost_piece, "parts of model.w .*are not all of it"),
        (twice, "parts of model.w .*overlap"),
        (swapped, "has it as F32"),
    ],
)
def test_an_index_that_disagrees(tmp_path: Path, change: Change, message: str) -> None:
    """Whole by the manifest, which was written for it: a mistake of a writer, not of a disk."""
    path = saved(tmp_path)
    content = json.loads((path / STATE).read_text("utf-8"))
    change(content["tensors"])
    (path / STATE).write_text(json.dumps(content), "utf-8")
    files = read_manifest(path)
    files[STATE] = FileSum((path / STATE).stat().st_size, sha256_file(path / STATE))
    write_manifest(path, files)
    with pytest.raises(CheckpointError, match=message):
        load_state(path)


def load_together(folder: Path) -> tuple[str, float]:
    """What every process of a group takes."""
    path, state = load_latest(folder, agreement=checkpoint_group())
    return path.name, float(state.tensors["model.w"].sum())


def test_processes_check_together_and_take_the_same(tmp_path: Path, ranks: Callable[..., list[Any]]) -> None:
    for step in (1, 2):
        saved(tmp_path, step)
    assert ranks(load_together, 2, tmp_path) == [("step-00000002", 2 * 595.0)] * 2
    for damaged in sorted((tmp_path / "step-00000002").glob("tensors-*")):
        content = damaged.read_bytes()
        damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert ranks(load_together, 2, tmp_path) == [("step-00000001", 595.0)] * 2
        damaged.write_bytes(content)


def test_every_bad_file_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    files = sorted(path.glob("tensors-*"))
    files[0].unlink()
    files[1].write_bytes(b"short")
    with pytest.raises(CheckpointError) as caught:
        load_state(path)
    assert all(re.search(f"{file.name} has (None|5) bytes", str(caught.value)) for file in files[:2])
