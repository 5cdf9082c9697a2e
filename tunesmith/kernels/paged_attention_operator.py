"""Paged attention by Triton as a torch custom operator: which kernels are launched, and how they are cut.

Imported only where Triton is installed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tunesmith.kernels import paged_attention_tiles as tiles
from tunesmith.kernels.launch import current, num_processors, overlaps, shared_bytes
from tunesmith.kernels.paged_attention_parts_triton import join_kernel
from tunesmith.kernels.paged_attention_tiles import Tile
from tunesmith.kernels.paged_attention_triton import attend_kernel
from tunesmith.kernels.quick import quick
from tunesmith.units import ceil_div

PARTS_AT_ONCE, JOIN_WARPS = 16, 4


@torch.library.custom_op("tunesmith::paged_attention", mutates_args=("out", "arrivals"))
def paged_attention_operator(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    out: Tensor,
    max_query: int,
    max_context: int,
    window: int | None,
    scale: float,
    invariant: bool,
    arrivals: Tensor | None,
    min_query: int = 1,
) -> None:
    """See tunesmith.kernels.paged_attention.paged_attention.

    What has to move, with b bytes a value in a page: 2 b K H for every position of every request in decoding.
    """
    num_tokens, num_heads, head_dim = query.shape
    if num_tokens == 0 or context.shape[0] == 0:
        return
    launch = _Launch(
        query, keys, values, block_tables, query_starts, context, key_scales, value_scales, out, window, scale
    )
    if arrivals is not None and not invariant and len(context) * keys.shape[2] <= arrivals.numel():
        launch.arrivals = arrivals
    group = num_heads // keys.shape[2]
    value_bytes, page_bytes = query.element_size(), keys.element_size()
    with current(query.device):
        if invariant:
            tile = tiles.invariant_tile(head_dim, value_bytes, page_bytes)
            if max_query * group <= tile.rows:
                launch.decode(tile, max_query, ceil_div(max_context, tiles.INVARIANT_SPLIT), None)
            else:
                launch.prefill(tile, 0, True)
            return
        shared = shared_bytes(query.device)
        tile = tiles.decode_tile(head_dim, value_bytes, page_bytes, group, shared)
        if min_query * group <= tile.rows:
            processors = num_processors(query.device)
            launch.decode(tile, max_query, *tiles.splits(len(context), keys.shape[2], max_context, processors))
        if max_query * group > tile.rows:
            launch.prefill(tiles.prefill_tile(head_dim, value_bytes, page_bytes, shared), tile.rows, False)


@paged_attention_operator.register_fake
def _paged_attention_fake(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    out: Tensor,
    max_query: int,
    max_context: int,
    window: int | None,
    scale: float,
    invariant: bool,
    arrivals: Tensor | None,
    min_query: int = 1,
) -> None:
    return None


class _Launch:
    """The arguments that every launch of one call shares."""

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        block_tables: Tensor,
        query_starts: Tensor,
        context: Tensor,
        key_scales: Tensor | None,
        value_scales: Tensor | None,
        out: Tensor,
        window: int | None,
        scale: float,
    ) -> None:
        self.query = query if query.stride(2) == 1 else query.contiguous()
        self.pages = (keys, values, query if key_scales is None else key_scales)
        self.value_scales = query if value_scales is None else value_scales
        self.tables, self.starts, self.context, self.out = block_tables, query_starts, context, out
        self.num_requests = context.shape[0]
        self.num_kv_heads = keys.shape[2]
        self.group = query.shape[1] // self.num_kv_heads
        self.window, self.has_window = window or 0, window is not None
        self.scale = scale * math.log2(math.e)
        self.shape = {"NUM_HEADS": self.num_kv_heads, "GROUP": self.group, "WIDTH": query.shape[2]}
        self.shape |= {"COLUMNS": tiles.padded(query.shape[2])}
        self.fp8 = key_scales is not None
        self.arrivals: Tensor | None = None

    def decode(self, tile: Tile, max_query: int, parts: int, least: int | None) -> None:
        """The requests whose rows fit into one tile, each in at most so many parts of its context.

        least: the fewest positions of a part; None: all have the one length that depends on nothing.
        """
        invariant = least is None
        overlap = self._overlap(invariant)
        held_rows = min(tile.rows, max_query * self.group)
        num_held = self.num_requests * self.num_kv_heads * held_rows * parts if parts > 1 else 0
        found = self.query.new_empty(num_held, tiles.padded(self.query.shape[2]), dtype=torch.float32)
        statistics = self.query.new_empty(num_held, 2, dtype=torch.float32)
        cut = {"FIXED": tiles.INVARIANT_SPLIT if least is None else 0, "LEAST": least or tiles.LEAST_SPLIT}
        programs = self.num_kv_heads * self.num_requests
        held = (found, statistics, parts, held_rows)
        join_rows = tiles.power_of_two(held_rows)
        joins = self.arrivals is not None and tiles.joins_inside(parts, join_rows, self.query.shape[2])
        shape = {"DECODE": True, "SMALL": 0, "SPLIT": parts > 1, "JOIN_ROWS": join_rows * joins}
        self._attend((programs, parts), tile, held, {**cut, **shape}, invariant)
        if parts == 1 or joins:
            return
        quick(join_kernel)[(programs, held_rows)](
            found,
            statistics,
            self.starts,
            self.context,
            self.out,
            self.window,
            self.out.stride(0),
            self.out.stride(1),
            parts,
            held_rows,
            ROWS=tile.rows,
            KEYS=tile.keys,
            WINDOW=self.has_window,
            AT_ONCE=1 if invariant else PARTS_AT_ONCE,
            OVERLAP=bool(overlap),
            num_warps=JOIN_WARPS,
            enable_fp_fusion=not invariant,
            **self.shape,
            **cut,
            **overlap,
        )

    def prefill(self, tile: Tile, small: int, invariant: bool) -> None:
        """The requests with more than `small` rows, a program for each tile of rows."""
        cut = {"LEAST": 1, "FIXED": tiles.INVARIANT_SPLIT if invariant else 0}
        # Every request has at most one tile that is not full.
        num_tiles = self.query.shape[0] * self.group // tile.rows + self.num_requests
        held = (self.query, self.query, 1, 1)
        cut |= {"DECODE": False, "SMALL": small, "SPLIT": False, "JOIN_ROWS": 0}
        self._attend((num_tiles, self.num_kv_heads), tile, held, cut, invariant)

    def _overlap(self, invariant: bool) -> dict[str, bool]:
        """The option of a launch that begins while the kernel before it ends."""
        return {"launch_pdl": True} if overlaps(self.query.device) and not invariant else {}

    def _attend(
        self,
        grid: tuple[int, ...],
        tile: Tile,
        held: tuple[Tensor, Tensor, int, int],
        cut: dict[str, int],
        invariant: bool,
    ) -> None:
        overlap = self._overlap(invariant)
        quick(attend_kernel)[grid](
            self.query,
            *self.pages,
            self.value_scales,
            self.tables,
            self.starts,
            self.context,
            self.out,
            *held[:2],
            held[1] if self.arrivals is None else self.arrivals,
            self.num_requests,
            self.scale,
            self.window,
            self.tables.stride(0),
            self.query.stride(0),
            self.query.stride(1),
            self.out.stride(0),
            self.out.stride(1),
            *held[2:],
            SLOTS=self.pages[0].shape[1],
            ROWS=tile.rows,
            KEYS=tile.keys,
            WINDOW=self.has_window,
            FP8=self.fp8,
            JOIN_AT_ONCE=tiles.parts_at_once(cut["JOIN_ROWS"], self.query.shape[2]),
            PHASES=2 if tile.rows >= tiles.INVARIANT_ROWS and not self.has_window else 1,
            OVERLAP=bool(overlap),
            num_warps=tile.warps,
            num_stages=tile.stages,
            # Where results must not depend on the batch, both kernels round the same sums in the same way.
            enable_fp_fusion=not invariant,
            **self.shape,
            **cut,
            **overlap,
        )
