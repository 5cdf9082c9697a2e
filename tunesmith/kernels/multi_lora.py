"""Low-rank adapters of many requests in one pass: every token's row takes the adapter that its request asked for.

    y[t] += up[s] (down[s] x[t])        s = slots[t], the adapter of token t; -1 adds nothing

The adapters of one fused linear lie in a stack; each of its P projections has a rank of its own, at most R:

    down [A, P * R, D]    projection p of adapter s in rows p * R .. p * R + rank[s, p] - 1
    up   [A, F, R]        alpha / rank is folded in; columns beyond the rank are zero

Tokens are sorted by adapter and cut into tiles that hold tokens of one adapter only. How many tiles there are is a
function of T alone (the rest is empty), so that a recorded graph goes with any choice of adapters.

On a CPU each adapter's rows are multiplied in turn. A product over gathered adapters (bmm) was measured beside it on
one core, ranks of 16: slower wherever adapters repeat, at best as fast for 16 tokens of 16 adapters in bfloat16.
Sources: arXiv 2106.09685, section 4.1; arXiv 2310.18547, section 4 (products over segments of a batch).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels.direct import direct
from tunesmith.kernels.launch import in_rows
from tunesmith.kernels.multi_lora_tiles import BAND, NO_ADAPTER, TILE, num_tiles, plan_tiles, tile_of
from tunesmith.kernels.nf4 import use_kernel


@dataclass(frozen=True)
class AdapterStack:
    """The adapters of one fused linear, by slot.

    down_AQD [A, P * R, D] and up_AFR [A, F, R] in the compute dtype; ranks_AP int32, 0 where a projection has no
    adapter, and `ranks`, the same on the host; `parts`: the rows of each projection; bands_N3 int32: bands of the
    output's columns (projection, first, stop) of at most `BAND`, none over two projections.
    """

    down_AQD: Tensor
    up_AFR: Tensor
    ranks_AP: Tensor
    bands_N3: Tensor
    parts: tuple[int, ...]
    ranks: list[list[int]] = field(default_factory=list)

    @property
    def max_rank(self) -> int:
        """R."""
        return self.up_AFR.shape[2]


def empty_stack(
    num_slots: int, in_features: int, parts: Sequence[int], max_rank: int, dtype: torch.dtype, device: torch.device
) -> AdapterStack:
    """A stack of so many slots, all empty."""
    bands, first = [], 0
    for part, rows in enumerate(parts):
        bands += [(part, start, min(start + BAND, first + rows)) for start in range(first, first + rows, BAND)]
        first += rows
    return AdapterStack(
        down_AQD=torch.zeros(num_slots, len(parts) * max_rank, in_features, dtype=dtype, device=device),
        up_AFR=torch.zeros(num_slots, first, max_rank, dtype=dtype, device=device),
        ranks_AP=torch.zeros(num_slots, len(parts), dtype=torch.int32, device=device),
        bands_N3=torch.tensor(bands, dtype=torch.int32, device=device),
        parts=tuple(parts),
        ranks=[[0] * len(parts) for _ in range(num_slots)],
    )


@dataclass(frozen=True)
class TokenAdapters:
    """Which adapter each token's row takes.

    slots: by token, on the host; num_slots: of the stacks.
    tile: the most tokens of a tile; invariant: it is the same for any number of tokens.
    order_T int32: the tokens, sorted by slot, those without adapter first; tiles_G3 int32: (slot, first, stop) in that
        order, slot -1 where a tile is empty. Both on the device, and there only where the kernels run.
    """

    slots: np.ndarray
    num_slots: int
    device: torch.device
    tile: int = TILE
    invariant: bool = False
    order_T: Tensor | None = None
    tiles_G3: Tensor | None = None

    @property
    def groups(self) -> list[tuple[int, slice | Tensor]]:
        """(slot, its rows), rows side by side as a slice."""
        return list(self._groups())

    def _groups(self) -> Iterator[tuple[int, slice | Tensor]]:
        for slot in np.unique(self.slots).tolist():
            rows = np.flatnonzero(self.slots == slot)
            if slot == NO_ADAPTER:
                continue
            if rows[-1] - rows[0] + 1 == len(rows):
                yield slot, slice(int(rows[0]), int(rows[-1]) + 1)
            else:
                yield slot, torch.from_numpy(rows).to(self.device)


def token_adapters(
    slots: Sequence[int] | np.ndarray, num_slots: int, device: torch.device, *, invariant: bool = False
) -> TokenAdapters:
    """The choice of these tokens, with what the kernels need where they run."""
    chosen = np.asarray(slots, dtype=np.int32)
    tile = tile_of(len(chosen), invariant=invariant)
    made = TokenAdapters(chosen, num_slots, device, tile, invariant)
    if not use_kernel(device):
        return made
    order, tiles = plan_tiles(chosen, num_slots, tile)
    packed = torch.from_numpy(np.concatenate((order, tiles.reshape(-1)))).to(device)
    return replace(made, order_T=packed[: len(order)], tiles_G3=packed[len(order) :].view(-1, 3))


def token_adapters_on_device(adapter_T: Tensor, num_slots: int, *, invariant: bool = False) -> TokenAdapters:
    """The choice of tokens whose slots are on the device only (int32), by operations that a CUDA graph can record.

    The host never sees the slots where the kernels run; elsewhere nothing is recorded, and it reads them.
    """
    device, num_tokens = adapter_T.device, adapter_T.shape[0]
    tile = tile_of(num_tokens, invariant=invariant)
    if not use_kernel(device):
        return TokenAdapters(adapter_T.cpu().numpy(), num_slots, device, tile, invariant)
    sorted_T, order_T = adapter_T.sort(stable=True)
    slots_S = torch.arange(num_slots, dtype=adapter_T.dtype, device=device)
    first_S = torch.searchsorted(sorted_T, slots_S)
    end_S = torch.searchsorted(sorted_T, slots_S, right=True)
    tiles_S = (end_S - first_S + tile - 1) // tile
    until_S = tiles_S.cumsum(0)
    numbers_G = torch.arange(num_tiles(num_tokens, num_slots, tile), device=device)
    slot_G = torch.searchsorted(until_S, numbers_G, right=True)
    is_used_G = slot_G < num_slots
    slot_G = slot_G.clamp(max=num_slots - 1)
    start_G = first_S[slot_G] + (numbers_G - until_S[slot_G] + tiles_S[slot_G]) * tile
    stop_G = torch.minimum(start_G + tile, end_S[slot_G])
    tiles_G3 = torch.stack((slot_G, start_G, stop_G), dim=1).where(is_used_G[:, None], NO_ADAPTER)
    unseen = np.full(num_tokens, NO_ADAPTER, dtype=np.int32)
    return TokenAdapters(unseen, num_slots, device, tile, invariant, order_T.int(), tiles_G3.int())


def add_multi_lora(y_TF: Tensor, x_TD: Tensor, stack: AdapterStack, chosen: TokenAdapters) -> None:
    """y[t] += up[s] (down[s] x[t]) in place, s being the adapter of token t."""
    if chosen.order_T is None or chosen.tiles_G3 is None:
        add_multi_lora_reference(y_TF, x_TD, stack, chosen)
        return
    from tunesmith.kernels.multi_lora_triton import multi_lora_operator

    held = y_TF if y_TF.stride(-1) == 1 else y_TF.contiguous()
    direct(multi_lora_operator, held)(
        held,
        in_rows(x_TD),
        stack.down_AQD,
        stack.up_AFR,
        stack.ranks_AP,
        stack.bands_N3,
        chosen.order_T,
        chosen.tiles_G3,
        chosen.tile,
    )
    if held is not y_TF:
        y_TF.copy_(held)


def add_multi_lora_reference(y_TF: Tensor, x_TD: Tensor, stack: AdapterStack, chosen: TokenAdapters) -> None:
    """The same, one adapter after the other."""
    for slot, rows in chosen.groups:
        x, target = x_TD[rows], y_TF[rows]
        _add_one(target, x, stack, slot)
        if not isinstance(rows, slice):
            y_TF[rows] = target


def _add_one(y_NF: Tensor, x_ND: Tensor, stack: AdapterStack, slot: int) -> None:
    """The adapter of one slot on rows that all take it."""
    width, first = stack.max_rank, 0
    for part, (rows, rank) in enumerate(zip(stack.parts, stack.ranks[slot], strict=True)):
        if rank:
            down = stack.down_AQD[slot, part * width : part * width + rank]
            up = stack.up_AFR[slot, first : first + rows, :rank]
            y_NF[:, first : first + rows].addmm_(F.linear(x_ND, down), up.t())
        first += rows
