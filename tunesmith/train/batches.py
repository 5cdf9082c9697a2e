"""A micro-batch on the host, ready to be copied to the device without a wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.errors import DataError
from tunesmith.model.packed import PackedTokens, packed
from tunesmith.recipe.schema import DataSection
from tunesmith.text.dataset import Document
from tunesmith.text.packing import build_pack
from tunesmith.train.losses import trained_positions
from tunesmith.units import ceil_div

_ALIGNMENT = 16


class Dataset(Protocol):
    """Tokenised documents: those of text.dataset, and random ones."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    @property
    def hashes(self) -> NDArray[np.uint64]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def arrays(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]: ...


@dataclass(frozen=True)
class MicroBatch:
    """T packed tokens and where the loss is.

    index, targets: the trained positions and their tokens. lengths: of the real documents, fillers left out.
    trained: tokens in the loss of the whole pack, where index and targets are a process's part of it.
    block: all the tensors once more, one behind the other in page-locked memory, so that one copy takes them to a GPU.
    """

    pack: PackedTokens
    index: Tensor
    targets: Tensor
    documents: tuple[int, ...]
    lengths: tuple[int, ...]
    num_tokens: int
    block: Tensor | None = None
    trained: int | None = None

    @property
    def num_trained(self) -> int:
        """Tokens in the loss."""
        return self.index.numel() if self.trained is None else self.trained

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`; the host does not wait for the copy."""
        if device.type == "cpu":
            return self
        if self.block is None:
            return self._of([tensor.to(device, non_blocking=True) for tensor in self._tensors()])
        return self._of(cut(self.block.to(device, non_blocking=True), self._tensors()))

    def part(self, cut: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> MicroBatch:
        """The same with what `cut(index, targets, tokens)` leaves of index and targets; it counts as the whole."""
        index, targets = cut(self.index, self.targets, self.pack.tokens_T.numel())
        return replace(self, index=index, targets=targets, trained=self.num_trained)

    def without_tail(self) -> MicroBatch:
        """The same without the fillers at its end: shapes need not be constant where nothing is compiled for them.

        Of a pack without documents one filler stays.
        """
        if not self.lengths:
            least = self.pack.lengths[:1]
            return replace(self, pack=packed(self.pack.tokens_T[: least[0]], least))
        real = sum(self.lengths)
        if self.pack.lengths[: len(self.lengths)] != self.lengths or real == self.pack.tokens_T.numel():
            return self  # padded slots have fillers between their documents, which keep their places
        return replace(self, pack=packed(self.pack.tokens_T[:real], self.lengths))

    def pinned(self) -> MicroBatch:
        """The same with its `block`, which a GPU copies by itself."""
        return replace(self, block=joined(self._tensors()).pin_memory())

    def _tensors(self) -> list[Tensor]:
        return [self.pack.tokens_T, self.pack.positions_T, self.pack.boundaries, self.index, self.targets]

    def _of(self, tensors: Sequence[Tensor]) -> MicroBatch:
        """The same with these as `_tensors`, and no block."""
        tokens, positions, boundaries, index, targets = tensors
        pack = PackedTokens(tokens, positions, self.pack.lengths, boundaries)
        return replace(self, pack=pack, index=index, targets=targets, block=None)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of vectors, uint8, one behind the other; each begins where any dtype may."""
    block = torch.zeros(sum(_padded(tensor.nbytes) for tensor in tensors), dtype=torch.uint8)
    for part, tensor in zip(cut(block, tensors), tensors, strict=True):
        part.copy_(tensor)
    return block


def cut(block: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The vectors in a block that was made of `like`, wherever the block is now: views."""
    ends = list(accumulate((_padded(tensor.nbytes) for tensor in like), initial=0))
    return [
        block[start : start + tensor.nbytes].view(tensor.dtype) for start, tensor in zip(ends[:-1], like, strict=True)
    ]


def _padded(num_bytes: int) -> int:
    return _ALIGNMENT * ceil_div(num_bytes, _ALIGNMENT)


def build_micro_batch(
    dataset: Dataset, documents: Sequence[int], micro_batch_tokens: int, data: DataSection, vocab_size: int | None
) -> MicroBatch:
    """The documents packed into exactly `micro_batch_tokens` tokens, on the host.

    Raises: DataError naming the row when a token id is outside the model's vocabulary.
    """
    pack = build_pack(
        dataset, documents, micro_batch_tokens, packing=data.packing, max_length=data.max_length, filler_id=0
    )
    tokens = pack.tokens
    if vocab_size is not None and int(tokens.max()) >= vocab_size:
        raise _outside_vocabulary(dataset, documents, vocab_size)
    index, targets = trained_positions(pack.targets)
    lengths = tuple(min(int(dataset.lengths[i]), data.max_length) for i in pack.documents)
    return MicroBatch(
        packed(tokens, pack.lengths), index, targets, tuple(pack.documents), lengths, pack.num_real_tokens
    )


def _outside_vocabulary(dataset: Dataset, documents: Sequence[int], vocab_size: int) -> DataError:
    for index in documents:
        document = dataset[index]
        if int(document.tokens.max()) >= vocab_size:
            largest = int(document.tokens.max())
            return DataError(
                f"{document.row}: token {largest} is outside the model's vocabulary of {vocab_size}: "
                "the tokenizer belongs to another model, or the embedding was not resized"
            )
    raise AssertionError("no document has the token")


def describe_rows(dataset: Dataset, documents: Sequence[int], most: int = 8) -> str:
    """The rows of a batch, for an error message."""
    rows = [dataset[index].row for index in documents[:most]]
    more = f" and {len(documents) - most} more" if len(documents) > most else ""
    return ", ".join(rows) + more


class RandomTokens:
    """Random token documents of one length, each a pure function of (seed, index): for speed and memory runs."""

    def __init__(self, count: int, length: int, vocab_size: int, seed: int, first: int = 0) -> None:
        self.lengths = np.full(count, length, dtype=np.int64)
        self.hashes = np.array([seed, first, vocab_size], dtype=np.uint64)
        self._length, self._vocab_size, self._seed, self._first = length, vocab_size, seed, first

    def __len__(self) -> int:
        return len(self.lengths)

    def arrays(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokens and trained flags: all but the first token are trained."""
        generator = np.random.default_rng([self._seed, self._first + index])
        tokens = generator.integers(0, self._vocab_size, self._length, dtype=np.int32)
        return tokens, np.arange(self._length) > 0

    def __getitem__(self, index: int) -> Document:
        tokens, trained = self.arrays(index)
        return Document(tokens=tokens, trained=trained, row=f"random:{self._first + index + 1}")
