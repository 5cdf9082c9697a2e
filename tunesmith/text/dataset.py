"""The recipe's data section to tokenised documents: read, encoded, cached, split, summarised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataSection
from tunesmith.text.places import name_place
from tunesmith.text.split import load_parts, split_note
from tunesmith.text.store import DocumentStore
from tunesmith.text.summary import DataSummary, Progress, summarise
from tunesmith.text.tokenise import with_template
from tunesmith.text.tokenizer import Tokenizer

__all__ = ["DataSummary", "Document", "TokenisedDataset", "TrainingData", "load_data"]


@dataclass(frozen=True)
class Document:
    """Tokens (int32) of one document; trained[i] tells whether token i is a target. row: its place in words."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    row: str


class TokenisedDataset:
    """Some of a store's documents, in a fixed order. lengths: int64 [documents]."""

    def __init__(self, store: DocumentStore, indices: NDArray[np.int64]) -> None:
        self._store = store
        self._indices = indices
        self.lengths: NDArray[np.int64] = np.ascontiguousarray(store.lengths[indices])

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:
        tokens, trained = self.arrays(index)
        at = int(self._indices[index])
        file = self._store.meta["files"][int(self._store.files[at])]
        return Document(tokens, trained, name_place(file, int(self._store.places[at])))

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))

    def arrays(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokens and trained flags, as views of the store."""
        at = int(self._indices[index])
        start, end = int(self._store.offsets[at]), int(self._store.offsets[at + 1])
        return self._store.tokens[start:end], self._store.trained[start:end]

    @property
    def conversations(self) -> int:
        """Conversations among the rows of the files (a split included)."""
        return int(self._store.meta["tally"]["conversations"])

    @property
    def ends_trained(self) -> int:
        """Conversations with an end-of-turn token that is trained."""
        return int(self._store.meta["tally"]["ends_trained"])

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """A hash of every document's content."""
        return self._store.hashes[self._indices]


@dataclass(frozen=True)
class TrainingData:
    """tokenizer: the one used, with data.chat_template where the recipe names one."""

    train: TokenisedDataset
    validation: TokenisedDataset | None
    summary: DataSummary
    tokenizer: Tokenizer


def load_data(data: DataSection, tokenizer: Tokenizer, *, seed: int, progress: Progress | None = None) -> TrainingData:
    """The tokenised training and validation documents of a recipe.

    Args: `seed`: chooses which rows are kept for validation, nothing else; `progress(what, done, total)`: rows, total 0
        while it is not known.
    Raises: DataError for a bad row (unless data.bad_rows is skip), an unreadable file, preference pairs, or nothing
        left to train on.
    """
    if data.format == "tokens":
        raise DataError("data.format 'tokens' is random ids made while training; there is no file to read")
    tokenizer = with_template(data, tokenizer)
    part, held, cached = load_parts(data, tokenizer, seed=seed, progress=progress)
    train = TokenisedDataset(part.store, part.examples)
    validation = TokenisedDataset(held.store, held.examples) if held else None
    hashes = validation.hashes if validation else None
    summary = summarise(part.store, train.hashes, hashes, train.lengths, cached, split_note(data, held))
    return TrainingData(train, validation, summary, tokenizer)
