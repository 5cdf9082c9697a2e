"""Parts of logical tensors: boxes, who writes which, and in which file. Arithmetic only.

    global tensor [6, 4]        rank 0: [[0, 3], [0, 4]]    a shard is one box of the whole tensor; a process may have
    cut by rows over two        rank 1: [[3, 6], [0, 4]]    several of one tensor, and several may have the same one

Nothing here knows how many processes read a state again, or how they divide its tensors.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import CheckpointError
from tunesmith.units import GIB

Slices = tuple[tuple[int, int], ...]
"""[start, stop) of every dimension."""
FILE_BYTES = 2 * GIB
"""A process writes as many files as it takes to stay below this: each is written and hashed by a thread."""
SINGLE = "tensors.safetensors"
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, eq=False)
class Shard:
    """What a process holds of a logical tensor: `tensor` is the box `slices` of a tensor of `global_shape`.

    Processes that hold the same box hand it over each, with the same values: one of them writes it.
    """

    name: str
    tensor: Tensor
    global_shape: tuple[int, ...]
    slices: Slices


@dataclass(frozen=True)
class Box:
    """A shard without its values. dtype: by safetensors' name."""

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    slices: Slices

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return volume(self.slices) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class PlannedFile:
    """One file of a state. entries: (which of the process's shards, under which key), in the file's order."""

    name: str
    rank: int
    entries: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Plan:
    """Who writes what. boxes: of every process, in the order in which it hands its shards over."""

    boxes: tuple[tuple[Box, ...], ...]
    files: tuple[PlannedFile, ...]

    def files_of(self, rank: int) -> list[PlannedFile]:
        """What a process writes."""
        return [file for file in self.files if file.rank == rank]

    def num_bytes(self, rank: int) -> int:
        """Bytes of the tensors that a process writes."""
        return sum(self.boxes[rank][number].num_bytes for file in self.files_of(rank) for number, _ in file.entries)

    def index(self) -> dict[str, Any]:
        """Logical name -> shape, dtype and pieces, as the state's JSON has it."""
        index: dict[str, Any] = {}
        for file in self.files:
            for number, key in file.entries:
                box = self.boxes[file.rank][number]
                entry = index.setdefault(
                    box.name, {"global_shape": list(box.global_shape), "dtype": box.dtype, "pieces": []}
                )
                slices = [list(one) for one in box.slices]
                entry["pieces"].append({"file": file.name, "key": key, "slices": slices})
        return index


def whole(name: str, tensor: Tensor) -> Shard:
    """A tensor that is all there is of `name`."""
    return Shard(name, tensor, tuple(tensor.shape), whole_slices(tensor.shape))


def whole_slices(shape: Iterable[int]) -> Slices:
    """The box that is everything."""
    return tuple((0, size) for size in shape)


def cut(name: str, tensor: Tensor, global_shape: Sequence[int], chunks: Iterable[tuple[Slices, Slices]]) -> list[Shard]:
    """The shards of a tensor that holds several boxes of the whole one (fused rows under tensor parallelism).

    Args: chunks: (box of `tensor`, the same box of the whole).
    """
    shape = tuple(global_shape)
    return [Shard(name, tensor[as_index(local)], shape, _tuples(there)) for local, there in chunks]


def cut_rows(name: str, tensor: Tensor, global_shape: Sequence[int], rows: Iterable[tuple[int, int]]) -> list[Shard]:
    """The shards of a tensor whose rows are these ranges of the whole one's rows, below each other."""
    chunks, first = [], 0
    others = whole_slices(tensor.shape[1:])
    for start, stop in rows:
        chunks.append((((first, first + stop - start), *others), ((start, stop), *others)))
        first += stop - start
    return cut(name, tensor, global_shape, chunks)


def box_of(shard: Shard) -> Box:
    """A shard without its values. Raises: CheckpointError when tensor, slices and global shape disagree."""
    slices, shape = _tuples(shard.slices), tuple(shard.global_shape)
    inside = len(slices) == len(shape) and all(
        0 <= start <= stop <= size for (start, stop), size in zip(slices, shape, strict=True)
    )
    if not inside or tuple(stop - start for start, stop in slices) != tuple(shard.tensor.shape):
        raise CheckpointError(
            f"{shard.name}: a tensor of shape {tuple(shard.tensor.shape)} can't be the part {slices} of {shape}"
        )
    if shard.tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{shard.name}: a checkpoint can't hold {shard.tensor.dtype}")
    return Box(shard.name, DTYPE_NAMES[shard.tensor.dtype], shape, slices)


def as_index(slices: Slices) -> tuple[slice, ...]:
    """What a tensor is indexed with."""
    return tuple(slice(start, stop) for start, stop in slices)


def volume(slices: Slices) -> int:
    """How many values a box has."""
    return math.prod(stop - start for start, stop in slices)


def overlap(one: Slices, other: Slices) -> Slices | None:
    """What two boxes share; None when that is nothing."""
    shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return None if any(start >= stop for start, stop in shared) else shared


def relative(slices: Slices, origin: Slices) -> Slices:
    """A box in the coordinates of one that it lies in."""
    return tuple((start - first, stop - first) for (start, stop), (first, _) in zip(slices, origin, strict=True))


def check_complete(name: str, global_shape: tuple[int, ...], boxes: Iterable[Slices]) -> None:
    """Raises: CheckpointError naming the tensor unless the boxes cover it, each value once."""
    filled = sorted(box for box in boxes if volume(box))
    covered, open_boxes = 0, list[Slices]()
    for box in filled:
        open_boxes = [other for other in open_boxes if not box or other[0][1] > box[0][0]]
        if any(overlap(box, other) is not None for other in open_boxes):
            raise CheckpointError(f"the parts of {name} overlap at {list(box)}")
        open_boxes.append(box)
        covered += volume(box)
    if covered != math.prod(global_shape):
        raise CheckpointError(
            f"the parts of {name} are not all of it: {covered} of {math.prod(global_shape)} values of "
            f"{list(global_shape)}"
        )


def make_plan(boxes: Sequence[Sequence[Box]], file_bytes: int | None = FILE_BYTES) -> Plan:
    """Who writes what, a pure function of what every process holds.

    A box that several hold goes to the one of them that has least to write yet, the largest boxes first.
    Raises: CheckpointError naming a tensor that is incomplete, overlaps, or is of two shapes or dtypes.
    """
    holders: dict[Box, list[tuple[int, int]]] = defaultdict(list)
    for rank, mine in enumerate(boxes):
        for number, box in enumerate(mine):
            if all(held != rank for held, _ in holders[box]):
                holders[box].append((rank, number))
    _check_boxes(holders)
    written = _divide(holders, len(boxes))
    files = [
        (rank, group) for rank, numbers in enumerate(written) for group in _group(boxes[rank], numbers, file_bytes)
    ]
    files = files or [(0, [])]
    named = (
        PlannedFile(_file_name(number, len(files)), rank, tuple((i, _key(boxes[rank][i])) for i in group))
        for number, (rank, group) in enumerate(files)
    )
    return Plan(tuple(tuple(mine) for mine in boxes), tuple(named))


def _check_boxes(holders: Mapping[Box, Any]) -> None:
    by_name: dict[str, list[Box]] = defaultdict(list)
    for box in holders:
        by_name[box.name].append(box)
    for name, parts in by_name.items():
        kinds = {(box.global_shape, box.dtype) for box in parts}
        if len(kinds) > 1:
            raise CheckpointError(f"processes disagree on {name}: {' and '.join(map(str, sorted(kinds)))}")
        check_complete(name, parts[0].global_shape, (box.slices for box in parts))


def _divide(holders: Mapping[Box, list[tuple[int, int]]], num_ranks: int) -> list[list[int]]:
    """The numbers of the shards that each process writes, in its own order."""
    loads, written = [0] * num_ranks, [list[int]() for _ in range(num_ranks)]
    alone = [(box, held) for box, held in holders.items() if len(held) == 1]
    shared = [(box, held) for box, held in holders.items() if len(held) > 1]
    shared.sort(key=lambda item: (-item[0].num_bytes, item[0].name, item[0].slices))
    for box, held in [*alone, *shared]:
        if volume(box.slices) == 0 < volume(whole_slices(box.global_shape)):
            continue  # an empty share of a tensor that others hold
        rank, number = min(held, key=lambda place: (loads[place[0]], place[0]))
        loads[rank] += box.num_bytes
        written[rank].append(number)
    return [sorted(numbers) for numbers in written]


def _group(boxes: Sequence[Box], numbers: Iterable[int], file_bytes: int | None) -> list[list[int]]:
    """The shards of each file, those of wide dtypes first so that every tensor is aligned."""
    groups: list[list[int]] = []
    used = 0
    for number in numbers:
        size = boxes[number].num_bytes
        if not groups or (file_bytes is not None and used + size > file_bytes):
            groups.append([])
            used = 0
        groups[-1].append(number)
        used += size
    return [sorted(group, key=lambda i: -DTYPES[boxes[i].dtype].itemsize) for group in groups]


def _file_name(number: int, count: int) -> str:
    return SINGLE if count <= 1 else f"tensors-{number:05d}-of-{count:05d}.safetensors"


def _key(box: Box) -> str:
    """The name in the file: the logical one, with the box where it is a part."""
    if box.slices == whole_slices(box.global_shape):
        return box.name
    return f"{box.name}[{','.join(f'{start}:{stop}' for start, stop in box.slices)}]"


def _tuples(slices: Iterable[Iterable[int]]) -> Slices:
    return tuple((int(start), int(stop)) for start, stop in slices)
