"""Packed tokens: several documents in one row, each attending to itself only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedTokens:
    """Whole documents laid end to end.

    tokens_T, positions_T: int64 on the model's device; positions restart at 0 in every document.
    lengths: the length of each document, in order, known on the host (their sum is T).
    boundaries: int32 [num_documents + 1], cumulative lengths on the device (what variable-length kernels want).
    """

    tokens_T: Tensor
    positions_T: Tensor
    lengths: tuple[int, ...]
    boundaries: Tensor

    @property
    def max_length(self) -> int:
        """The longest document."""
        return max(self.lengths)

    def length_of_each_token(self) -> Tensor:
        """int64 [T]: the length of the document each token belongs to."""
        lengths = self.boundaries.diff().long()
        return lengths.repeat_interleave(lengths, output_size=self.tokens_T.numel())


@dataclass(frozen=True)
class BoundedPack(PackedTokens):
    """A pack whose documents only the device knows: `lengths` are an example, `boundaries` has room for more documents,
    which are empty, and no document is longer than `longest`.
    """

    longest: int = 0

    @property
    def max_length(self) -> int:
        """No document is longer."""
        return self.longest


def pack_documents(documents: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> PackedTokens:
    """Token ids of several documents, packed in order. Empty documents are not allowed."""
    if not documents or any(len(document) == 0 for document in documents):
        raise ValueError("every document must have at least one token")
    lengths = tuple(len(document) for document in documents)
    tokens = torch.tensor([token for document in documents for token in document], dtype=torch.int64)
    return packed(tokens.to(device), lengths)


def packed(tokens_T: Tensor, lengths: Sequence[int]) -> PackedTokens:
    """Packed tokens from ids already laid end to end and the documents' lengths."""
    ends = list(accumulate(lengths, initial=0))
    if ends[-1] != tokens_T.numel():
        raise ValueError(f"lengths sum to {ends[-1]}, got {tokens_T.numel()} tokens")
    positions = torch.cat([torch.arange(length) for length in lengths])
    device = tokens_T.device
    boundaries = torch.tensor(ends, dtype=torch.int32)
    if device.type == "cuda":
        positions, boundaries = positions.pin_memory(), boundaries.pin_memory()
    return PackedTokens(
        tokens_T,
        positions.to(device, non_blocking=True),
        tuple(lengths),
        boundaries.to(device, non_blocking=True),
    )
