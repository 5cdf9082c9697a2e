"""Preference pairs as training on them would see them: tokenised, cached, split, summarised.

No trainer uses them yet; a pair is what one needs: two documents that share a prompt, their answers marked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataSection
from tunesmith.text.dataset import Document, TokenisedDataset
from tunesmith.text.split import Part, load_parts, split_note
from tunesmith.text.summary import KEPT, Progress, counted, skipped_lines
from tunesmith.text.tokenise import first_format, with_template
from tunesmith.text.tokenizer import Tokenizer
from tunesmith.units import format_count


class PreferencePair(NamedTuple):
    """Two documents that begin with the same prompt; in each only its answer is trained."""

    chosen: Document
    rejected: Document

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the answers."""
        return int(self.chosen.trained.argmax())


class PreferencePairs:
    """Some of a store's pairs, in a fixed order.

    documents: chosen of pair i at 2i, rejected at 2i + 1, to be packed like any others.
    lengths: int64 [pairs, 2], tokens of the chosen and the rejected document. prompt_lengths: int64 [pairs], the
    tokens that both begin with.
    """

    def __init__(self, part: Part) -> None:
        both = np.stack([2 * part.examples, 2 * part.examples + 1], axis=1)
        self.documents = TokenisedDataset(part.store, both.reshape(-1))
        self.lengths: NDArray[np.int64] = self.documents.lengths.reshape(-1, 2)
        firsts = (int(self.documents.arrays(2 * i)[1].argmax()) for i in range(len(self)))
        self.prompt_lengths = np.fromiter(firsts, dtype=np.int64, count=len(self))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> PreferencePair:
        at = range(len(self))[index]
        return PreferencePair(self.documents[2 * at], self.documents[2 * at + 1])

    def __iter__(self) -> Iterator[PreferencePair]:
        return (self[i] for i in range(len(self)))

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """A hash of every pair's content."""
        return self.documents.hashes[::2]


@dataclass(frozen=True)
class LengthSummary:
    """Percentiles of lengths in tokens."""

    p50: int
    p90: int
    p99: int
    max: int


@dataclass(frozen=True)
class PreferenceSummary:
    """The pairs in numbers.

    formats: file -> format. skipped_reasons: reason -> {count, first}. tokens: of all documents, validation
    included; chosen_tokens, rejected_tokens: of them those of the answers, which are trained. lengths: of the training
    pairs' "prompt", "chosen" and "rejected" answers. chosen_longer_ratio: training pairs whose chosen answer is the
    longer one. truncated, too_long: pairs of which a document is over data.max_length;
    dropped: pairs whose answers are not both there, or are alike, within it. straddling: pairs whose answer joins
    the prompt in one token. ends_trained: pairs with an end-of-turn token trained in both answers. overlap:
    validation pairs that are also in the training data. split_note: which rows are kept out, or why none are.
    """

    formats: dict[str, str]
    rows: int
    skipped: int
    skipped_reasons: dict[str, dict[str, Any]]
    pairs: int
    validation_pairs: int
    tokens: int
    chosen_tokens: int
    rejected_tokens: int
    lengths: dict[str, LengthSummary]
    chosen_longer_ratio: float
    truncated: int
    too_long: int
    dropped: int
    straddling: int
    ends_trained: int
    overlap: int
    cached: bool
    split_note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """What a person reads."""
        out = [
            f"{counted(self.rows, 'row')} in {counted(len(self.formats), 'file')}, format preference"
            + (KEPT if self.cached else ""),
            f"{counted(self.pairs, 'pair')} to train on, {self.validation_pairs} to validate on; "
            f"{format_count(self.tokens)} tokens, trained: {format_count(self.chosen_tokens)} of chosen answers, "
            f"{format_count(self.rejected_tokens)} of rejected ones",
        ]
        out += [
            f"{name} in tokens: median {found.p50}, 90 % {found.p90}, 99 % {found.p99}, longest {found.max}"
            for name, found in self.lengths.items()
        ]
        out.append(f"the chosen answer is the longer one in {self.chosen_longer_ratio:.0%} of the pairs")
        notes = {
            f"{self.truncated} pairs cut at data.max_length": self.truncated,
            f"{self.too_long} pairs left out as too long": self.too_long,
            f"{self.dropped} pairs left out: an answer missing, or both alike, within data.max_length": self.dropped,
            f"{self.straddling} pairs whose answer joins the prompt in one token": self.straddling,
            f"{self.overlap} validation pairs are in the training data too": self.overlap,
        }
        out += [self.split_note] if self.split_note else []
        return out + [note for note, count in notes.items() if count] + skipped_lines(self.skipped_reasons)


@dataclass(frozen=True)
class PreferenceData:
    """tokenizer: the one used, with data.chat_template where the recipe names one."""

    train: PreferencePairs
    validation: PreferencePairs | None
    summary: PreferenceSummary
    tokenizer: Tokenizer


def holds_preferences(data: DataSection) -> bool:
    """Whether the first file of data.train has preference pairs.

    Raises: DataError when it can't be read, or its format can't be told.
    """
    return first_format(data) == "preference"


def load_preferences(
    data: DataSection, tokenizer: Tokenizer, *, seed: int, progress: Progress | None = None
) -> PreferenceData:
    """The tokenised training and validation pairs of a recipe.

    Pairs go through the tokenisation, the cache and the split that conversations go through. data.max_length holds
    for each document of a pair; data.too_long and data.bad_rows decide on the pair.
    Args: `seed`: chooses which pairs are kept for validation, nothing else; `progress(what, done, total)`: rows.
    Raises: DataError for a bad row (unless data.bad_rows is skip), an unreadable file, rows that are no pairs, or
        nothing left.
    """
    if data.train_on != "answers":
        raise DataError(f"data.train_on is {data.train_on!r}; of preference pairs only the answers are trained")
    tokenizer = with_template(data, tokenizer)
    part, held, cached = load_parts(data, tokenizer, seed=seed, progress=progress, pairs=True)
    train, validation = PreferencePairs(part), PreferencePairs(held) if held else None
    note = split_note(data, held, pairs=True)
    return PreferenceData(train, validation, _summarise(part, train, validation, cached, note), tokenizer)


def _summarise(
    part: Part, train: PreferencePairs, validation: PreferencePairs | None, cached: bool, note: str | None
) -> PreferenceSummary:
    store = part.store
    tally = store.meta["tally"]
    answers = np.add.reduceat(store.trained, store.offsets[:-1], dtype=np.int64)
    overlap = 0 if validation is None else int(np.isin(validation.hashes, train.hashes).sum())
    return PreferenceSummary(
        formats=store.meta["formats"],
        rows=tally["rows"],
        skipped=tally["skipped"],
        skipped_reasons=tally["reasons"],
        pairs=len(train),
        validation_pairs=0 if validation is None else len(validation),
        tokens=int(store.lengths.sum()),
        chosen_tokens=int(answers[::2].sum()),
        rejected_tokens=int(answers[1::2].sum()),
        lengths={
            "prompt": _lengths(train.prompt_lengths),
            "chosen": _lengths(train.lengths[:, 0] - train.prompt_lengths),
            "rejected": _lengths(train.lengths[:, 1] - train.prompt_lengths),
        },
        chosen_longer_ratio=float((train.lengths[:, 0] > train.lengths[:, 1]).mean()),
        truncated=tally["truncated"],
        too_long=tally["too_long"],
        dropped=tally["dropped"],
        straddling=tally["straddling"],
        ends_trained=tally["ends_trained"],
        overlap=overlap,
        cached=cached,
        split_note=note,
    )


def _lengths(lengths: NDArray[np.int64]) -> LengthSummary:
    return LengthSummary(*(int(np.percentile(lengths, q, method="nearest")) for q in (50, 90, 99, 100)))
