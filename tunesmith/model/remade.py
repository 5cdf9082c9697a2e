"""Query, key and value that are made again in the backward pass, not held: `selective-qkv`.

    forward    x -> norm, qkv, rope -> query, key, value -> attention, which would save all three
    backward   attention asks for one of them: x -> norm, qkv, rope once more, for attention and for the projection

Attention's kernels are torch's and save what they like; hooks of autograd put a note in place of every view of the
three. So whatever kernel is chosen for a shape, it is the kernel that runs without this.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tunesmith.model.heads import HeldHeads
from tunesmith.model.saved_view import SavedView

Made = tuple[Tensor, Tensor, Tensor, HeldHeads]
"""What `Heads.prepare` returns."""


class RemadeHeads:
    """One block's query, key and value in one pass: given away by the forward pass, made once in the backward pass."""

    def __init__(self) -> None:
        self._make: Callable[[], Made] | None = None
        self._made: Made | None = None

    def made_by(self, make: Callable[[], Made]) -> None:
        """How they are made again. It gives tensors laid out as the first time."""
        self._make = make

    def not_held(self, query: Tensor, key: Tensor, value: Tensor) -> AbstractContextManager[object]:
        """Around attention: of these three, it saves how to find them again."""
        if self._make is None or not torch.is_grad_enabled():
            return nullcontext()
        sources = {t.untyped_storage().data_ptr(): i for i, t in reversed([*enumerate((query, key, value))])}

        def pack(tensor: Tensor) -> Tensor | tuple[int, SavedView]:
            source = sources.get(tensor.untyped_storage().data_ptr()) if tensor.layout == torch.strided else None
            if source is None:
                return tensor.detach()  # the output of a node, held by that node as it is, would keep both alive
            return source, SavedView.note(tensor)

        def unpack(packed: Tensor | tuple[int, SavedView]) -> Tensor:
            return packed if isinstance(packed, Tensor) else packed[1].of(self._again()[:3][packed[0]])

        return saved_tensors_hooks(pack, unpack)

    def take(self) -> HeldHeads:
        """What the backward pass of the heads needs. Nothing is kept here afterwards."""
        held = self._again()[3]
        self._make = self._made = None
        return held

    def _again(self) -> Made:
        if self._made is None:
            if self._make is None:
                raise RuntimeError("with selective-qkv a backward pass can be gone through once")
            with torch.no_grad():
                self._made = self._make()
        return self._made
