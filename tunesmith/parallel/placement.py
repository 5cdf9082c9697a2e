"""Which part of a whole tensor a tensor-parallel process holds: arithmetic only.

a linear's weight [F, D], two processes       by rows (qkv, gate-up)        by columns (output, down)
                                              q  0 | 1                      0 0 1 1
A fused linear is cut projection by           k  0 | 1                      0 0 1 1
projection: a process holds rows of each,     v  0 | 1                      0 0 1 1
and fuses what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Range = tuple[int, int]
Box = tuple[Range, ...]
"""[start, stop) of every dimension."""
# GPT-2 holds queries, keys and values as one projection.
_THIRDS = {"c_attn": 3}


class Chunk(NamedTuple):
    """A box of the tensor that a process holds, and where that lies in the whole."""

    local: Box
    whole: Box


@dataclass(frozen=True)
class Placement:
    """A process's part of a tensor whose whole has `shape`: chunks that together are all that it holds.

    is_sharded: whether other processes hold other parts (it then counts as a part in a norm); else all hold the same.
    """

    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    is_sharded: bool

    def within(self, box: Box) -> tuple[Chunk, ...]:
        """The chunks of a box of what is held, in that box's own coordinates: when it is cut once more (ZeRO)."""
        cut = (_intersection(chunk, box) for chunk in self.chunks)
        return tuple(chunk for chunk in cut if chunk is not None)


@dataclass(frozen=True)
class Shard:
    """How one linear is cut. parts, in_features: of the whole."""

    kind: Literal["rows", "columns"]
    index: int
    count: int
    parts: Mapping[str, int]
    in_features: int

    @property
    def own_parts(self) -> dict[str, int]:
        """Rows of each projection that are held."""
        divisor = self.count if self.kind == "rows" else 1
        return {part: rows // divisor for part, rows in self.parts.items()}

    @property
    def own_in_features(self) -> int:
        """Columns that are held."""
        start, stop = self.columns
        return stop - start

    @property
    def columns(self) -> Range:
        """The columns that are held."""
        if self.kind == "rows":
            return 0, self.in_features
        width = self.in_features // self.count
        return self.index * width, (self.index + 1) * width

    def rows(self, part: str) -> tuple[Range, ...]:
        """The rows of a projection that are held, counted within it."""
        total = self.parts[part]
        if self.kind == "columns":
            return ((0, total),)
        pieces = _THIRDS.get(part, 1)
        step = total // pieces
        width = step // self.count
        starts = (piece * step + self.index * width for piece in range(pieces))
        return tuple((start, start + width) for start in starts)

    def fused_rows(self) -> tuple[Range, ...]:
        """The rows of the fused linear that are held."""
        found, first = [], 0
        for part, total in self.parts.items():
            found += [(first + start, first + stop) for start, stop in self.rows(part)]
            first += total
        return tuple(found)

    def placement(self, parameter: str, local_shape: tuple[int, ...], *, is_held: bool = True) -> Placement:
        """Where a parameter of the linear lies, by its path below the linear ("weight", "adapters.q_proj.A").

        is_held: whether this process holds it at all.
        """
        name = parameter.rpartition(".")[2]
        part = parameter.split(".")[1] if parameter.startswith("adapters.") else None
        total = sum(self.parts.values()) if part is None else self.parts[part]
        by_rows = name != "A" and self.kind == "rows"
        by_columns = name in ("weight", "A") and self.kind == "columns"
        rows: tuple[Range, ...] = ((0, local_shape[0]),)
        if by_rows:
            rows = self.fused_rows() if part is None else self.rows(part)
        others = [(0, size) for size in local_shape[1:]]
        if by_columns:
            others = [self.columns]
        shape = (local_shape[0] if name == "A" else total, *([self.in_features] if by_columns else local_shape[1:]))
        chunks = _chunks_of_rows(rows, tuple(others)) if is_held else ()
        return Placement(shape, chunks, by_rows or by_columns or (name == "bias" and self.kind == "columns"))


def whole_placement(shape: tuple[int, ...]) -> Placement:
    """Of a tensor that every process holds."""
    box = tuple((0, size) for size in shape)
    return Placement(shape, (Chunk(box, box),), is_sharded=False)


def _chunks_of_rows(rows: tuple[Range, ...], others: Box) -> tuple[Chunk, ...]:
    """Ranges of rows that lie below each other in what is held."""
    chunks, first = [], 0
    inner = tuple((0, stop - start) for start, stop in others)
    for start, stop in rows:
        chunks.append(Chunk(((first, first + stop - start), *inner), ((start, stop), *others)))
        first += stop - start
    return tuple(chunks)


def _intersection(chunk: Chunk, box: Box) -> Chunk | None:
    local, whole = [], []
    for (start, stop), (first, _), (low, high) in zip(chunk.local, chunk.whole, box, strict=True):
        begin, end = max(start, low), min(stop, high)
        if begin >= end:
            return None
        local.append((begin - low, end - low))
        whole.append((first + begin - start, first + end - start))
    return Chunk(tuple(local), tuple(whole))
