"""The token ids of every step, made once on the host and read by every runner but ours, which makes them itself.

A document's labels are Hugging Face's: the id itself where it is predicted from the ids before it, else -100.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.recipe.schema import DataSection
from tunesmith.train.batches import MicroBatch
from tunesmith.train.losses import IGNORED


@dataclass(frozen=True)
class Documents:
    """One micro-batch: `tokens_T` and `labels_T` int64, documents of `lengths` end to end, no filler."""

    tokens_T: Tensor
    labels_T: Tensor
    lengths: tuple[int, ...]

    @property
    def num_trained(self) -> int:
        """Tokens in the loss."""
        return int((self.labels_T != IGNORED).sum())

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return self.tokens_T.numel()


Window = Sequence[Documents]


def documents_of(batch: MicroBatch, data: DataSection) -> Documents:
    """What a micro-batch on the host holds, its fillers left out."""
    tokens_T = batch.pack.tokens_T
    labels_T = torch.full_like(tokens_T, IGNORED)
    labels_T[batch.index + 1] = batch.targets
    kept = _kept_positions(batch, data)
    return Documents(tokens_T[kept].contiguous(), labels_T[kept].contiguous(), batch.lengths)


def _kept_positions(batch: MicroBatch, data: DataSection) -> Tensor:
    """Where the documents lie: end to end when packed, else each at the start of a slot of max_length."""
    if data.packing:
        return torch.arange(sum(batch.lengths))
    starts = range(0, data.max_length * len(batch.lengths), data.max_length)
    spans = [torch.arange(start, start + length) for start, length in zip(starts, batch.lengths, strict=True)]
    return torch.cat(spans)


def peer_inputs(documents: Documents, *, packed: bool) -> dict[str, Tensor]:
    """What a model of transformers takes: `input_ids`, `labels`, and what tells documents apart where they need it.

    Equal lengths are a plain [B, S] batch. Others are one row with positions that start anew (packed), or rows padded
    to the longest with a mask.
    """
    longest = max(documents.lengths)
    if len(set(documents.lengths)) == 1:
        return {
            "input_ids": documents.tokens_T.view(-1, longest),
            "labels": documents.labels_T.view(-1, longest),
        }
    if packed:
        positions = torch.cat([torch.arange(length) for length in documents.lengths])
        return {
            "input_ids": documents.tokens_T[None],
            "labels": documents.labels_T[None],
            "position_ids": positions[None],
        }
    return {
        "input_ids": _padded(documents.tokens_T, documents.lengths, 0),
        "labels": _padded(documents.labels_T, documents.lengths, IGNORED),
        "attention_mask": _padded(torch.ones_like(documents.tokens_T), documents.lengths, 0),
    }


def _padded(values_T: Tensor, lengths: Sequence[int], filler: int) -> Tensor:
    rows = values_T.split(list(lengths))
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=filler)


def digest(window: Window) -> str:
    """A hash of a step's ids, labels and lengths: who has another one did other work."""
    hashed = hashlib.sha256()
    for documents in window:
        for tensor in (documents.tokens_T, documents.labels_T, torch.tensor(documents.lengths)):
            hashed.update(tensor.to(torch.int64).numpy().tobytes())
    return hashed.hexdigest()[:16]


def save_windows(windows: Sequence[Window], path: Path) -> None:
    """Write every step's micro-batches to one safetensors file."""
    tensors = {}
    for step, window in enumerate(windows):
        for index, documents in enumerate(window):
            key = f"{step:06d}.{index:06d}"
            tensors[f"{key}.tokens"] = documents.tokens_T
            tensors[f"{key}.labels"] = documents.labels_T
            tensors[f"{key}.lengths"] = torch.tensor(documents.lengths)
    save_file(tensors, path)


def load_windows(path: Path) -> list[list[Documents]]:
    """What `save_windows` wrote."""
    tensors = load_file(path)
    windows: list[list[Documents]] = []
    for step, key in _keys(tensors):
        if step == len(windows):
            windows.append([])
        lengths = tuple(tensors[f"{key}.lengths"].tolist())
        windows[step].append(Documents(tensors[f"{key}.tokens"], tensors[f"{key}.labels"], lengths))
    return windows


def _keys(tensors: dict[str, Tensor]) -> Iterator[tuple[int, str]]:
    for key in sorted({name.rpartition(".")[0] for name in tensors}):
        yield int(key.partition(".")[0]), key
