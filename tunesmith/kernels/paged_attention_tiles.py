"""How the kernels of paged attention are cut: the tile of a program, and into how many parts a long context is split.

Everything follows from numbers the host knows without asking the device (shapes, dtypes, `max_query`, `max_context`),
so that a step can be recorded in a CUDA graph. How long a part is, a program works out on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from tunesmith.kernels.launch import LEAST_SHARED_BYTES
from tunesmith.units import ceil_div

DECODE_ROWS = 16
"""Rows of a decode tile, the least that the tensor cores multiply: query heads of one key head, times new tokens."""
INVARIANT_ROWS, INVARIANT_SPLIT = 64, 512
"""Where results must not depend on the batch every tile has this many rows, and every part this many positions."""
LEAST_SPLIT = 128
"""Positions below which another part costs more than it hides."""
LONGEST_SPLIT = 2048
"""Positions of a part where there are programs enough without parts: the last to end keeps all waiting."""
MOST_SPLITS = 64
JOINED_VALUES, JOIN_ROUNDS, JOINED_ROWS = 4096, 4, 4
"""Values that a program joins at once, how often it may, and of how many rows of a request: else a kernel joins.

On an H200 with 8 rows (7B) joining inside took 35 us where the kernel took 18 (16 requests, 800 positions); with 2 rows
(Qwen3-0.6B) 7.9 beside 8.5 (one request).
"""
_ENOUGH_PROGRAMS, _PROGRAMS_WANTED = 2, 16
"""For each processor: with so many programs contexts are left whole; with fewer, parts for so many."""


@dataclass(frozen=True)
class Tile:
    """rows: of queries, heads counted; keys: positions at once; stages: of the copy that runs ahead."""

    rows: int
    keys: int
    warps: int
    stages: int


_forced: dict[str, Tile] = {}


@contextmanager
def with_tile(kind: Literal["decode", "prefill"], tile: Tile) -> Iterator[None]:
    """This tile and no other, for whoever looks for a chip's best."""
    _forced[kind] = tile
    try:
        yield
    finally:
        del _forced[kind]


def decode_tile(
    head_dim: int, value_bytes: int, page_bytes: int, group: int, shared_bytes: int = LEAST_SHARED_BYTES
) -> Tile:
    """The tile of requests with few new tokens.

    Args: value_bytes: of a query's value; page_bytes: of one in a page; group: query heads of a key head.
    """
    if "decode" in _forced:
        return _forced["decode"]
    width, rows = padded(head_dim), max(DECODE_ROWS, power_of_two(group))
    if value_bytes == 4:
        return Tile(rows, 32 if width <= 128 else 16, 4, 3)
    if width * page_bytes > 256:
        return Tile(rows, 32, 4, 3)
    return Tile(rows, 128, 4, 2) if shared_bytes > LEAST_SHARED_BYTES else Tile(rows, 64, 4, 3)


def prefill_tile(head_dim: int, value_bytes: int, page_bytes: int, shared_bytes: int = LEAST_SHARED_BYTES) -> Tile:
    """The tile of requests with many new tokens."""
    if "prefill" in _forced:
        return _forced["prefill"]
    width = padded(head_dim)
    if value_bytes == 4:
        return Tile(64, 32, 4, 3) if width <= 128 else Tile(32, 16, 4, 3)
    if width > 128:
        return Tile(64, 32, 4, 3) if shared_bytes <= LEAST_SHARED_BYTES else Tile(128, 64, 8, 3)
    if width <= 64 or shared_bytes > LEAST_SHARED_BYTES:
        return Tile(128, 64, 8 if width > 64 else 4, 3)
    return Tile(64, 64, 4, 3)


def invariant_tile(head_dim: int, value_bytes: int, page_bytes: int) -> Tile:
    """The one tile of all requests where a result must not depend on the batch."""
    width = padded(head_dim)
    if value_bytes == 4:
        return Tile(INVARIANT_ROWS if width <= 128 else 32, 16, 4, 3)
    return Tile(INVARIANT_ROWS, 64 if width <= 128 else 32, 4, 3)


def splits(num_requests: int, num_kv_heads: int, max_context: int, processors: int) -> tuple[int, int]:
    """How contexts are cut in decoding: the most parts of one, a power of two, and the fewest positions of a part.

    Where requests are few, into parts for all processors. Where they are many, only what is so long that the others
    would wait for it: measured on an H200 with contexts of 200 to 1,400, 256 requests of 4 key heads took 120 us whole
    and 142 in two parts, 16 took 35 whole and 17 in 16 parts.
    """
    programs = max(1, num_requests * num_kv_heads)
    if programs >= _ENOUGH_PROGRAMS * processors:
        return power_of_two(min(8, ceil_div(max_context, LONGEST_SPLIT))), LONGEST_SPLIT
    wanted = ceil_div(_PROGRAMS_WANTED * processors, programs)
    most = max(1, min(MOST_SPLITS, ceil_div(max_context, LEAST_SPLIT)))
    return min(power_of_two(wanted), power_of_two(most)), LEAST_SPLIT


def parts_at_once(rows: int, head_dim: int) -> int:
    """Parts that are joined at once by the program of so many rows: as many as need no more registers than scores."""
    return max(1, min(16, JOINED_VALUES // (max(1, rows) * padded(head_dim))))


def joins_inside(parts: int, rows: int, head_dim: int) -> bool:
    """Whether so many parts are joined by the program that ends last, and not by a kernel of its own."""
    return rows <= JOINED_ROWS and 1 < parts <= JOIN_ROUNDS * parts_at_once(rows, head_dim)


def padded(head_dim: int) -> int:
    """Columns of a tile: a power of two, 16 at least."""
    return max(16, power_of_two(head_dim))


def power_of_two(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << max(0, number - 1).bit_length()
