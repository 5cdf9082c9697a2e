"""Documents laid into packs of exactly T tokens.

    packed     | document 7 ........ | document 2 ... | 9 .. | filler |
    padded     | document 7 .. filler | document 2 ... filler |   (slots of max_length, the rest filler)

The plan of an epoch is a pure function of lengths, seed and epoch: any step can be found again after a kill.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tunesmith.errors import DataError

UNTRAINED = -100
LOOK_AHEAD = 64  # open packs a document may still go into


class Documents(Protocol):
    """What packing needs of a dataset: its documents' tokens and masks."""

    def arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int32) and trained flags (bool) of a document."""
        ...


@dataclass(frozen=True)
class Pack:
    """One micro-batch of T tokens on the host.

    tokens, targets: int64 tensors [T]; targets[i] is the next token of the same document, or -100.
    lengths: of every document in order, fillers included (they sum to T). documents: the dataset indices of the
    real ones. num_real_tokens: without fillers; num_trained: targets that count.
    """

    tokens: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    documents: tuple[int, ...]
    num_real_tokens: int
    num_trained: int


def plan_epoch(
    lengths: Sequence[int] | np.ndarray,
    micro_batch_tokens: int,
    *,
    seed: int,
    epoch: int,
    packing: bool,
    max_length: int,
    shuffle: bool = True,
) -> list[tuple[int, ...]]:
    """The document indices of every pack of an epoch; each document is in exactly one.

    Packed: documents in shuffled order go into the fullest of the open packs that has room; at most LOOK_AHEAD
    packs are open, so the order stays nearly the shuffled one. Padded: T // max_length documents a pack.
    Raises: DataError for a document that is empty, or longer than a pack (or than its slot).
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    room = micro_batch_tokens if packing else min(max_length, micro_batch_tokens)
    if sizes.size and (int(sizes.max()) > room or int(sizes.min()) < 1):
        raise DataError(
            f"documents must have 1 to {room} tokens to fit a micro-batch, got {int(sizes.min())} to "
            f"{int(sizes.max())}; lower data.max_length or raise train.micro_batch_tokens"
        )
    order = np.arange(sizes.size)
    if shuffle:
        order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(sizes.size)
    if not packing:
        slots = micro_batch_tokens // max_length
        return [tuple(order[i : i + slots].tolist()) for i in range(0, order.size, slots)]
    packs = _fill(order.tolist(), sizes[order].tolist(), micro_batch_tokens)
    if shuffle:
        # Packs close by fullness; shuffling them again keeps ragged ones from gathering at the end.
        packs = [packs[i] for i in np.random.Generator(np.random.PCG64([seed, epoch, 1])).permutation(len(packs))]
    return packs


def _fill(order: list[int], sizes: list[int], capacity: int) -> list[tuple[int, ...]]:
    """Best fit among the open packs; when too many are open, the fullest is closed."""
    done: list[tuple[int, ...]] = []
    contents: dict[int, list[int]] = {}
    open_packs: list[tuple[int, int]] = []  # (room left, number), the fullest first
    for document, size in zip(order, sizes, strict=True):
        best = bisect_left(open_packs, (size, -1))
        if best < len(open_packs):
            room, number = open_packs.pop(best)
        else:
            room, number = capacity, document
            contents[number] = []
        contents[number].append(document)
        if room == size:
            done.append(tuple(contents.pop(number)))
        else:
            insort(open_packs, (room - size, number))
        if len(open_packs) > LOOK_AHEAD:
            done.append(tuple(contents.pop(open_packs.pop(0)[1])))
    return done + [tuple(contents[number]) for _, number in open_packs]


def fill_rate(lengths: Sequence[int] | np.ndarray, plan: Sequence[tuple[int, ...]], micro_batch_tokens: int) -> float:
    """The share of the packs' tokens that are documents, 0 to 1."""
    if not plan:
        return 0.0
    sizes = np.asarray(lengths, dtype=np.int64)
    real = sum(int(sizes[list(pack)].sum()) for pack in plan)
    return real / (len(plan) * micro_batch_tokens)


def build_pack(
    dataset: Documents,
    indices: Sequence[int],
    micro_batch_tokens: int,
    *,
    packing: bool,
    max_length: int,
    filler_id: int = 0,
) -> Pack:
    """The pack of these documents: exactly `micro_batch_tokens` tokens, the rest untrained filler documents."""
    tokens = np.full(micro_batch_tokens, filler_id, dtype=np.int64)
    targets = np.full(micro_batch_tokens, UNTRAINED, dtype=np.int64)
    lengths: list[int] = []
    start, num_real_tokens = 0, 0
    for index in indices:
        ids, trained = dataset.arrays(index)
        size = len(ids)
        tokens[start : start + size] = ids
        targets[start : start + size - 1] = np.where(trained[1:], ids[1:], UNTRAINED)
        lengths.append(size)
        start += size
        num_real_tokens += size
        if not packing and size < max_length:
            lengths.append(max_length - size)
            start += max_length - size
    while start < micro_batch_tokens:  # fillers are no longer than documents: positions may be learned
        lengths.append(min(max_length, micro_batch_tokens - start))
        start += lengths[-1]
    return Pack(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        tuple(lengths),
        tuple(int(index) for index in indices),
        num_real_tokens,
        int((targets != UNTRAINED).sum()),
    )
