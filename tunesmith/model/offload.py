"""What blocks save for their backward pass waits in host memory, and is back before it is read.

    compute   block 0 | block 1      | block 2      | ... | backward 2       | backward 1       | backward 0
    copies            | 0 to host    | 1 to host    | ... | 1 to the device  | 0 to the device  |

At most two blocks' worth is on the device: the block at work, and the one that is being copied. What the last block
saves stays, because it is read at once. Every storage moves once, however many views of it are saved.

Device memory is allocated and freed in the order of the computation, which waits for a copy before what was copied is
freed or read: so the caching allocator's own rules hold, and all of it can be recorded as CUDA graphs. Host memory
is taken once and used again by the next forward pass; a recorded graph goes on using what it was recorded with.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tunesmith.model.saved_view import SavedView
from tunesmith.model.transfer import Transfer

LEAST_BYTES = 1 << 20
"""Storages smaller than this stay where they are."""


class Offloader:
    """Runs the blocks of a decoder, pass after pass, with what they save moved by `transfer`."""

    def __init__(self, transfer: Transfer, least_bytes: int = LEAST_BYTES) -> None:
        self.transfer = transfer
        self.least_bytes = max(least_bytes, 1)
        self.host = HostMemory(transfer)

    def begin(self) -> OffloadedPass:
        """A forward pass and its backward pass. It lives as long as the graph that autograd builds in it."""
        return OffloadedPass(self)


class HostMemory:
    """Buffers on the host. They are kept when given back: recorded graphs know them by their addresses."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._free: list[Tensor] = []
        self.total_bytes = 0

    @property
    def leased_bytes(self) -> int:
        """Bytes of the buffers that are in use."""
        return self.total_bytes - sum(buffer.numel() for buffer in self._free)

    def lease(self, num_bytes: int, holder: object) -> Tensor:
        """uint8 [num_bytes], `holder`'s until it is gone: the smallest free buffer that is large enough, or a new one.

        A buffer may be given back while a copy is still queued, because all copies are queued in one order.
        """
        fitting = [i for i, buffer in enumerate(self._free) if buffer.numel() >= num_bytes]
        if fitting:
            buffer = self._free.pop(min(fitting, key=lambda i: self._free[i].numel()))
        else:
            buffer = self._transfer.allocate(num_bytes)
            self.total_bytes += num_bytes
        weakref.finalize(holder, self._free.append, buffer).atexit = False
        return buffer[:num_bytes]


class _Moved:
    """One storage: on the device as `source` until it is copied, on the host, and again on the device as `fetched`.

    Only what is packed in autograd's graph holds it, so it is gone when the last of its readers has run.
    """

    def __init__(self, source: Tensor, owner: _Saved) -> None:
        self.device = source.device
        self.source: Tensor | None = source
        self.host: Tensor | None = None
        self.fetched: Tensor | None = None
        self.owner = owner


class _Saved:
    """What one block saved, by the address of the storage; `busy`: what queued copies still read or write."""

    def __init__(self) -> None:
        self.moved: weakref.WeakValueDictionary[int, _Moved] = weakref.WeakValueDictionary()
        self.busy: list[Tensor] = []
        self.ticket: Any = None


@dataclass(frozen=True)
class _Piece:
    """A saved tensor, as a view of a storage that moved."""

    moved: _Moved
    view: SavedView


class OffloadedPass:
    """One forward pass through the blocks, and the way back."""

    def __init__(self, offloader: Offloader) -> None:
        self._offloader = offloader
        self._blocks: list[_Saved] = []

    def run(
        self,
        block: Callable[..., Tensor],
        hidden_TD: Tensor,
        *args: Any,
        kept: Iterable[Tensor],
        is_last: bool,
    ) -> Tensor:
        """block(hidden, *args), the next in order.

        Args: kept: parameters, buffers and tables, which stay on the device. is_last: what it saves stays too.
        """
        saved = _Saved()
        if is_last:
            out = block(hidden_TD, *args)
        else:
            addresses = {tensor.untyped_storage().data_ptr() for tensor in kept}
            with saved_tensors_hooks(partial(self._pack, saved, hidden_TD.device, addresses), self._unpack):
                out = block(hidden_TD, *args)
        if self._blocks:
            self._release(self._blocks[-1])
        self._send(saved)
        if out.requires_grad:
            out.register_hook(partial(self._before_backward, len(self._blocks)))
        self._blocks.append(saved)
        return out

    def __del__(self) -> None:
        # A pass that broke off: memory is not handed on before the copies that touch it are done.
        for saved in self._blocks:
            self._join(saved)

    def _pack(self, saved: _Saved, device: torch.device, kept: set[int], tensor: Tensor) -> Tensor | _Piece:
        if tensor.device != device or tensor.layout != torch.strided:
            return tensor.detach()
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if storage.nbytes() < self._offloader.least_bytes or address in kept:
            return tensor.detach()  # the output of a node, held by that node as it is, would keep both alive
        moved = self._known(saved, address)
        if moved is None:
            source = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
            saved.moved[address] = moved = _Moved(source, saved)
        return _Piece(moved, SavedView.note(tensor))

    def _known(self, saved: _Saved, address: int) -> _Moved | None:
        """The storage at an address, if this block or the one before has saved it and it is still on the device."""
        for block in (saved, *self._blocks[-1:]):
            moved = block.moved.get(address)
            if moved is not None and moved.source is not None:
                return moved
        return None

    def _unpack(self, packed: Tensor | _Piece) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        moved = packed.moved
        if moved.source is not None:
            return packed.view.of(moved.source)
        self._fetch(moved.owner)
        self._join(moved.owner)
        assert moved.fetched is not None
        return packed.view.of(moved.fetched)

    def _before_backward(self, index: int, _: Tensor) -> None:
        """Double buffering: this block's tensors are there, the copies of those before it are queued."""
        self._fetch(self._blocks[index])
        self._join(self._blocks[index])
        if index > 0:
            self._fetch(self._blocks[index - 1])

    def _send(self, saved: _Saved) -> None:
        pairs = []
        for moved in saved.moved.values():
            if moved.source is not None:
                moved.host = self._offloader.host.lease(moved.source.numel(), moved)
                pairs.append((moved.host, moved.source))
        self._queue(saved, pairs, [source for _, source in pairs])

    def _release(self, saved: _Saved) -> None:
        """Free the device's memory of what has been sent."""
        self._join(saved)
        for moved in saved.moved.values():
            moved.source = None

    def _fetch(self, saved: _Saved) -> None:
        """Queue the copies back of what is on the host only."""
        pairs = []
        for moved in saved.moved.values():
            if moved.source is None and moved.fetched is None and moved.host is not None:
                moved.fetched = torch.empty_like(moved.host, device=moved.device)
                pairs.append((moved.fetched, moved.host))
        self._queue(saved, pairs, [target for target, _ in pairs])

    def _queue(self, saved: _Saved, pairs: list[tuple[Tensor, Tensor]], busy: list[Tensor]) -> None:
        if not pairs:
            return
        self._join(saved)
        with torch.no_grad():
            saved.ticket, saved.busy = self._offloader.transfer.copy(pairs), busy

    def _join(self, saved: _Saved) -> None:
        if saved.ticket is not None:
            self._offloader.transfer.wait(saved.ticket)
            saved.ticket, saved.busy = None, []
