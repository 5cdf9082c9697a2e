"""Tensors of a training state by logical name: whole, or any box of one, put together from the pieces on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.checkpoint.shards import (
    DTYPES,
    Shard,
    Slices,
    as_index,
    check_complete,
    overlap,
    relative,
    whole_slices,
)
from tunesmith.checkpoint.tensor_files import TensorFile
from tunesmith.errors import CheckpointError, nearest


@dataclass(frozen=True)
class StoredPiece:
    """A box of a logical tensor, and where it lies."""

    file: str
    key: str
    slices: Slices


@dataclass(frozen=True)
class StoredTensor:
    """What the index says of a logical tensor."""

    dtype: torch.dtype
    global_shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one state. `tensors[name]` is whole; `read` takes a box. Nothing is read before it is asked for.

    Args: index: the state's, by logical name; files: the names that were verified.
    Raises: CheckpointError when the index and the files disagree.
    """

    def __init__(
        self, path: Path, index: Mapping[str, Any], files: Iterable[str], device: torch.device | str = "cpu"
    ) -> None:
        self.path, self._device = path, device
        self._entries = {name: _parse(path, name, entry) for name, entry in index.items()}
        used = {piece.file for entry in self._entries.values() for piece in entry.pieces}
        unknown = sorted(used - set(files))
        if unknown:
            raise CheckpointError(
                f"checkpoint {path} is corrupted: its index names {unknown[0]}, which its manifest lacks"
            )
        self._files = {name: TensorFile(path / name) for name in sorted(used)}
        for name, entry in self._entries.items():
            self._check(name, entry)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._entries:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # a mapping's own would read the tensor

    def entry(self, name: str) -> StoredTensor:
        """Shape, dtype and pieces. Raises: CheckpointError for a name that the state does not have."""
        if name not in self._entries:
            raise CheckpointError(f"checkpoint {self.path} has no tensor {name!r}{nearest(name, self._entries)}")
        return self._entries[name]

    def read(self, name: str, slices: Sequence[Sequence[int]] | None = None) -> Tensor:
        """A box of a logical tensor (None: all of it), on the device. Reads its bytes only.

        Raises: CheckpointError for a name that is not there, or a box that is not inside it.
        """
        entry = self.entry(name)
        box = whole_slices(entry.global_shape) if slices is None else self._box(name, entry, slices)
        out = torch.empty([stop - start for start, stop in box], dtype=entry.dtype)
        for piece in entry.pieces:
            shared = overlap(piece.slices, box)
            if shared is not None:
                target = out[as_index(relative(shared, box))]
                self._files[piece.file].read_into(piece.key, relative(shared, piece.slices), target)
        return out.to(self._device)

    def _box(self, name: str, entry: StoredTensor, slices: Sequence[Sequence[int]]) -> Slices:
        box = tuple((int(start), int(stop)) for start, stop in slices)
        shape = entry.global_shape
        if len(box) != len(shape) or any(
            not 0 <= start <= stop <= size for (start, stop), size in zip(box, shape, strict=True)
        ):
            raise CheckpointError(f"{name} is {list(shape)} in {self.path}: it has no part {list(box)}")
        return box

    def _check(self, name: str, entry: StoredTensor) -> None:
        """The index against the headers of the files."""
        check_complete(f"{name} in {self.path}", entry.global_shape, (piece.slices for piece in entry.pieces))
        for piece in entry.pieces:
            file = self._files[piece.file]
            shape = tuple(stop - start for start, stop in piece.slices)
            if piece.key not in file:
                raise self._disagrees(piece, "has no such tensor")
            slot = file.slot(piece.key)
            if slot.shape != shape or DTYPES[slot.dtype] != entry.dtype:
                raise self._disagrees(piece, f"has it as {slot.dtype} {list(slot.shape)}, not {list(shape)}")

    def _disagrees(self, piece: StoredPiece, how: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self.path} is corrupted: its index names {piece.key}, but {piece.file} {how}"
        )


def load(
    tensors: StoredTensors, wanted: Mapping[str, tuple[Sequence[int], Sequence[Sequence[int]]]]
) -> dict[str, Tensor]:
    """Boxes of logical tensors: name -> (global shape, slices), whatever world size or layout wrote them.

    Raises: CheckpointError naming a tensor that is missing, or of another shape.
    """
    for name, (shape, _) in wanted.items():
        _check_shape(tensors, name, shape)
    return {name: tensors.read(name, slices) for name, (_, slices) in wanted.items()}


def fill(tensors: StoredTensors, shards: Iterable[Shard]) -> None:
    """Put into every shard's tensor what the state has there: `save`'s shards, the other way.

    Raises: CheckpointError naming a tensor that is missing, or of another shape or dtype; nothing is filled then.
    """
    shards = list(shards)
    for shard in shards:
        _check_shape(tensors, shard.name, shard.global_shape)
        stored = tensors.entry(shard.name).dtype
        if stored != shard.tensor.dtype:
            raise CheckpointError(
                f"the checkpoint is of another model: {shard.name} is {stored} there, {shard.tensor.dtype} here"
            )
    with torch.no_grad():
        for shard in shards:
            shard.tensor.copy_(tensors.read(shard.name, shard.slices))


def _check_shape(tensors: StoredTensors, name: str, shape: Sequence[int]) -> None:
    stored = tensors.entry(name).global_shape
    if stored != tuple(shape):
        raise CheckpointError(f"the checkpoint is of another model: {name} is {list(stored)} there, {list(shape)} here")


def _parse(path: Path, name: str, entry: Any) -> StoredTensor:
    """An entry of the index. Those of version 1 were one whole piece, under the tensor's name."""
    try:
        shape = tuple(int(size) for size in entry["global_shape"])
        raw = entry.get("pieces") or [{**entry, "key": name}]
        pieces = tuple(
            StoredPiece(piece["file"], piece["key"], tuple((int(a), int(b)) for a, b in piece["slices"]))
            for piece in raw
        )
        found = StoredTensor(DTYPES[entry["dtype"]], shape, pieces)
        if any(len(piece.slices) != len(shape) for piece in pieces):
            raise ValueError("a piece of other dimensions")
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {path} is corrupted: its index of {name} can't be read ({error!r})"
        ) from None
