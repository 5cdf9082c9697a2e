"""The manifest: whatever was changed after writing is found out, in it too."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tunesmith.checkpoint.manifest import MANIFEST, STATE, read_manifest, verify, write_manifest
from tunesmith.checkpoint.tensor_files import FileSum
from tunesmith.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files and their manifest."""
    sums = {}
    for name, content in ((STATE, b"{}"), ("tensors.safetensors", b"abc")):
        (tmp_path / name).write_bytes(content)
        sums[name] = FileSum(len(content), hashlib.sha256(content).hexdigest())
    write_manifest(tmp_path, sums)
    return tmp_path


def test_what_was_written_is_whole(folder: Path) -> None:
    assert verify(folder) == {STATE, "tensors.safetensors"}
    assert read_manifest(folder)["tensors.safetensors"].num_bytes == 3


def test_every_single_bit_of_the_manifest_counts(folder: Path) -> None:
    content = (folder / MANIFEST).read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        (folder / MANIFEST).write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            verify(folder)


def test_every_length_of_the_manifest_counts(folder: Path) -> None:
    content = (folder / MANIFEST).read_bytes()
    for length in range(len(content)):
        (folder / MANIFEST).write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            verify(folder)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"files": 3}', '{"files": {"a": 1}, "schema_version": 2}', "[" * 100_000],
)
def test_a_manifest_that_is_none(folder: Path, content: str) -> None:
    (folder / MANIFEST).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(folder)


def test_one_that_calls_itself_of_the_first_version_keeps_its_checksum(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    content["schema_version"] = 1
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not as it was written"):
        verify(folder)


def test_a_folder_in_place_of_a_file(folder: Path) -> None:
    (folder / STATE).unlink()
    (folder / STATE).mkdir()
    with pytest.raises(CheckpointError, match=r"state\.json has None bytes"):
        verify(folder)
