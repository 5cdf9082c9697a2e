"""What happened to the rows: counted while they are read, shown before training, written into the run directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError
from tunesmith.text.encoding import EncodedRows
from tunesmith.text.places import name_place
from tunesmith.text.store import DocumentStore
from tunesmith.units import format_count

# progress(what, done, total): total 0 while it is not known.
Progress = Callable[[str, int, int], None]
KEPT = " (tokenised by an earlier command, and kept)"


@dataclass
class Tally:
    """Counts over all files. A bad row raises DataError when `stop` is set."""

    stop: bool
    too_long_stops: bool
    max_length: int
    rows: int = 0
    skipped: int = 0
    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)
    too_long: int = 0
    truncated: int = 0
    dropped: int = 0
    untrained_turns: int = 0
    straddling: int = 0
    conversations: int = 0
    ends_trained: int = 0
    multi_turn: int = 0

    def add(self, file: str, rows: int, encoded: EncodedRows) -> None:
        """Counts a batch of one file."""
        self.rows += rows
        for place, reason in encoded.problems:
            if self.stop:
                raise bad_row(file, place, reason)
            self.skipped += 1
            kind = self.reasons.setdefault(reason, {"count": 0, "first": name_place(file, place)})
            kind["count"] += 1
        if encoded.too_long and self.too_long_stops:
            raise DataError(
                f"{name_place(file, encoded.too_long[0])}: the document is longer than data.max_length "
                f"({self.max_length}); raise it, or set data.too_long to truncate or skip"
            )
        self.too_long += len(encoded.too_long)
        for name in (
            "truncated",
            "dropped",
            "untrained_turns",
            "straddling",
            "conversations",
            "ends_trained",
            "multi_turn",
        ):
            setattr(self, name, getattr(self, name) + getattr(encoded, name))

    def as_dict(self) -> dict[str, Any]:
        """The counts alone."""
        return {k: v for k, v in asdict(self).items() if k not in ("stop", "too_long_stops", "max_length")}


@dataclass(frozen=True)
class DataSummary:
    """The data of a run in numbers.

    formats: file -> format. columns: file -> the keys it is read from, where they are not the format's own.
    skipped_reasons: reason -> {count, first}. length_*: tokens of the training documents.
    tokens, trained_tokens: of all documents, those split off for validation included. dropped: documents with no
    trained token within max_length. untrained_turns: answers that the template shows differently once a
    conversation goes on. straddling: conversations whose prompt is tokenised differently when served.
    ends_trained: conversations with a trained end-of-turn token. multi_turn: conversations with more than one user
    turn. overlap: validation documents that are also in
    the training data. split_note: which rows are kept out of training, or why none are.
    """

    formats: dict[str, str]
    rows: int
    skipped: int
    skipped_reasons: dict[str, dict[str, Any]]
    documents: int
    validation_documents: int
    tokens: int
    trained_tokens: int
    truncated: int
    too_long: int
    dropped: int
    conversations: int
    ends_trained: int
    multi_turn: int
    untrained_turns: int
    straddling: int
    overlap: int
    length_p50: int
    length_p90: int
    length_p99: int
    length_max: int
    cached: bool
    split_note: str | None = None
    columns: dict[str, list[str]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the run directory."""
        return asdict(self)

    def lines(self) -> list[str]:
        """What a person reads before training."""
        formats = sorted({name + self._read_from(file) for file, name in self.formats.items()})
        out = [
            f"{counted(self.rows, 'row')} in {counted(len(self.formats), 'file')}, format {' and '.join(formats)}"
            + (KEPT if self.cached else ""),
            f"{counted(self.documents, 'document')} to train on, {self.validation_documents} to validate on; "
            f"{format_count(self.tokens)} tokens, {format_count(self.trained_tokens)} trained "
            f"({self.trained_tokens / max(self.tokens, 1):.0%})",
            f"length in tokens: median {self.length_p50}, 90 % {self.length_p90}, 99 % {self.length_p99}, "
            f"longest {self.length_max}",
        ]
        notes = {
            f"{self.truncated} cut at data.max_length": self.truncated,
            f"{self.too_long} left out as too long": self.too_long,
            f"{self.dropped} left out with no trained token": self.dropped,
            f"{self.untrained_turns} earlier answers not trained (the template changes them)": self.untrained_turns,
            f"{self.straddling} conversations whose answer joins the prompt in one token": self.straddling,
            f"{self.overlap} validation documents are in the training data too": self.overlap,
        }
        out += [self.split_note] if self.split_note else []
        out += [note for note, count in notes.items() if count]
        return out + skipped_lines(self.skipped_reasons)

    def _read_from(self, file: str) -> str:
        columns = self.columns.get(file)
        return f" (read from {', '.join(columns)})" if columns else ""


def bad_row(file: str, place: int, reason: str) -> DataError:
    """The error for a row that is wrong, where data.bad_rows is stop."""
    return DataError(
        f"{name_place(file, place)}: {reason} (to leave bad rows out and count them: --set data.bad_rows=skip)"
    )


def counted(count: int, thing: str) -> str:
    """As in "1 row" and "2 rows"."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def skipped_lines(reasons: dict[str, dict[str, Any]]) -> list[str]:
    """The commonest reasons that rows were skipped for, a line each."""
    commonest = sorted(reasons.items(), key=lambda item: -item[1]["count"])[:8]
    return [f"{counted(kind['count'], 'row')} skipped: {reason} (first: {kind['first']})" for reason, kind in commonest]


def summarise(
    store: DocumentStore,
    train_hashes: NDArray[np.uint64],
    validation_hashes: NDArray[np.uint64] | None,
    train_lengths: NDArray[np.int64],
    cached: bool,
    note: str | None = None,
) -> DataSummary:
    """The summary of a store and its split, which `note` describes."""
    tally = store.meta["tally"]
    p50, p90, p99, most = (int(np.percentile(train_lengths, q, method="nearest")) for q in (50, 90, 99, 100))
    overlap = 0 if validation_hashes is None else int(np.isin(validation_hashes, train_hashes).sum())
    return DataSummary(
        formats=store.meta["formats"],
        rows=tally["rows"],
        skipped=tally["skipped"],
        skipped_reasons=tally["reasons"],
        documents=len(train_lengths),
        validation_documents=0 if validation_hashes is None else len(validation_hashes),
        tokens=int(store.lengths.sum()),
        trained_tokens=int(np.count_nonzero(store.trained)),
        truncated=tally["truncated"],
        too_long=tally["too_long"],
        dropped=tally["dropped"],
        conversations=tally["conversations"],
        ends_trained=tally["ends_trained"],
        multi_turn=tally["multi_turn"],
        untrained_turns=tally["untrained_turns"],
        straddling=tally["straddling"],
        overlap=overlap,
        length_p50=p50,
        length_p90=p90,
        length_p99=p99,
        length_max=most,
        cached=cached,
        split_note=note,
        columns=store.meta["columns"],
    )
