"""safetensors files, written in one pass with their checksum and read a box at a time, without mapping them whole.

Source: the format's own description: eight bytes, the length of a JSON header; the header; the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tunesmith.checkpoint.shards import DTYPE_NAMES, DTYPES, Slices, as_index
from tunesmith.errors import CheckpointError

Bytes = bytes | memoryview


@dataclass(frozen=True)
class FileSum:
    """What a manifest knows of a file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Slot:
    """A tensor to be written: key, dtype by safetensors' name, shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def slot_of(key: str, tensor: Tensor) -> Slot:
    """The slot of a tensor."""
    return Slot(key, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def write_file(
    path: Path, slots: Sequence[Slot], data: Iterable[Bytes], metadata: Mapping[str, str] | None = None
) -> FileSum:
    """Write a new safetensors file and flush it to the disk. `data`: the slots' bytes in order, cut anywhere.

    Raises: OSError when the disk is full.
    """
    head = header(slots, metadata)
    digest, written = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        for content in chain([head], data):
            _write_all(file, content)
            digest.update(content)
            written += len(content)
        os.fsync(file.fileno())
    expected = len(head) + sum(slot.num_bytes for slot in slots)
    if written != expected:
        raise CheckpointError(f"{path.name}: {written} bytes came, {expected} were announced")
    return FileSum(written, digest.hexdigest())


def _write_all(file: Any, content: Bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def header(slots: Sequence[Slot], metadata: Mapping[str, str] | None = None) -> bytes:
    """The beginning of a file that holds `slots`, padded to eight bytes."""
    content: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for slot in slots:
        end = start + slot.num_bytes
        content[slot.key] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(content, ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, on the host: a view where it lies there whole."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(cast(Any, flat.view(torch.uint8).numpy()))


class TensorFile:
    """The tensors of a safetensors file; a box of one is read when it is asked for.

    Nothing stays mapped: reading a state larger than memory takes no more than what is asked for.
    Raises: CheckpointError for a header that is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                text = file.read(length)
            content = json.loads(text)
            content.pop("__metadata__", None)
            self._slots = {key: _stored(key, entry, 8 + length) for key, entry in content.items()}
        except (
            OSError,
            struct.error,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            MemoryError,
        ) as e:
            raise CheckpointError(f"{path} is torn or no safetensors file ({e!r})") from None

    def __contains__(self, key: str) -> bool:
        return key in self._slots

    def keys(self) -> list[str]:
        """All keys, in the file's order."""
        return list(self._slots)

    def slot(self, key: str) -> Slot:
        """Dtype and shape of a tensor."""
        return self._slots[key][0]

    def read_into(self, key: str, box: Slices, target: Tensor) -> None:
        """Fill `target`, a tensor on the host of the box's shape, with a box of a tensor. Reads those bytes only."""
        slot, offset = self._slots[key]
        size = DTYPES[slot.dtype].itemsize
        if target.numel() == 0:
            return
        start = _run_start(slot.shape, box)
        if start is not None and target.is_contiguous():
            self._read_run(offset + start * size, memoryview(cast(Any, _bytes_of(target.view(-1)))))
            return
        shape = (*slot.shape[:-1], slot.shape[-1] * size)
        stored = np.memmap(self.path, dtype=np.uint8, mode="r", offset=offset, shape=shape)
        last = slice(box[-1][0] * size, box[-1][1] * size)
        _bytes_of(target)[...] = stored[(*as_index(box[:-1]), last)]

    def _read_run(self, offset: int, view: memoryview) -> None:
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{self.path} ends too early")
                view = view[count:]


def _stored(key: str, entry: Mapping[str, Any], start: int) -> tuple[Slot, int]:
    slot = Slot(key, entry["dtype"], tuple(int(size) for size in entry["shape"]))
    first, last = entry["data_offsets"]
    if last - first != slot.num_bytes or first < 0:
        raise ValueError(f"{last - first} bytes for {key}")
    return slot, start + first


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """A tensor's memory as bytes; its last dimension is dense."""
    return tensor.detach().view(torch.uint8).numpy()


def _run_start(shape: tuple[int, ...], box: Slices) -> int | None:
    """Where a box begins, in values, if its values lie behind each other; else None."""
    position, stride, is_run = 0, 1, True
    for size, (start, stop) in zip(reversed(shape), reversed(box), strict=True):
        if not is_run and stop - start > 1:
            return None
        position += start * stride
        is_run = is_run and start == 0 and stop == size
        stride *= size
    return position
