"""How a tensor that autograd saves lies in its storage, for finding it again in another copy of the storage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SavedView:
    """dtype, shape, strides and offset (in elements) of a view; it holds nothing of the tensor."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def note(cls, tensor: Tensor) -> SavedView:
        """The view that a strided tensor is."""
        return cls(tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def of(self, storage: Tensor) -> Tensor:
        """The same view of the storage that this tensor has."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage.untyped_storage(), self.offset, self.shape, self.stride)
