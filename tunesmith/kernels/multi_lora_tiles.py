"""Tokens sorted by their adapter and cut into tiles of one adapter each: arithmetic on the host."""

from __future__ import annotations

import numpy as np

from tunesmith.units import ceil_div

NO_ADAPTER = -1
# Tokens of a tile: few where a pass has few (decode), many where it has many (prefill).
TILE, WIDE_TILE = 16, 64
_WIDE_FROM = 512
# Columns of the output that one program adds to.
BAND = 128


def tile_of(num_tokens: int, *, invariant: bool = False) -> int:
    """Tokens of a tile; `invariant`: the same for any number of tokens, so that a row's sums have one order."""
    return WIDE_TILE if num_tokens >= _WIDE_FROM and not invariant else TILE


def num_tiles(num_tokens: int, num_slots: int, tile: int) -> int:
    """The most tiles that so many tokens can need."""
    return ceil_div(num_tokens, tile) + min(num_slots, num_tokens)


def plan_tiles(slots: np.ndarray, num_slots: int, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """order [T] and tiles [G, 3] of `TokenAdapters`, int32, on the host."""
    order = np.argsort(slots, kind="stable").astype(np.int32)
    tiles = np.full((num_tiles(len(slots), num_slots, tile), 3), NO_ADAPTER, dtype=np.int32)
    found, counts = np.unique(slots, return_counts=True)
    end, filled = 0, 0
    for slot, count in zip(found.tolist(), counts.tolist(), strict=True):
        first, end = end, end + count
        if slot == NO_ADAPTER:
            continue
        for start in range(first, end, tile):
            tiles[filled] = (slot, start, min(start + tile, end))
            filled += 1
    return order, tiles
