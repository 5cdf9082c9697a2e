"""The recipe's data section to tokenised documents: read, encoded, cached, split, summarised."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataSection
from tunesmith.text.encoding import EncodedRows, EncodeSettings, encode_rows
from tunesmith.text.files import Source, find_sources
from tunesmith.text.formats import detect_format
from tunesmith.text.reader import Row, read_rows
from tunesmith.text.store import DocumentStore, StoreWriter, cached_store, temporary_store
from tunesmith.text.summary import DataSummary, Progress, Tally, summarise
from tunesmith.text.tokenizer import Tokenizer
from tunesmith.text.workers import available_cores, ordered_map

__all__ = ["DataSummary", "Document", "TokenisedDataset", "TrainingData", "load_data"]

_BATCH_ROWS = 500
_IN_PROCESS_BATCHES = 10
_LOOK_AT = 32  # rows the format is detected from


@dataclass(frozen=True)
class Document:
    """Tokens (int32) of one document; trained[i] tells whether token i is a target. row: "file:line"."""

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
        return Document(tokens, trained, f"{file}:{int(self._store.lines[at])}")

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
    Raises: DataError for a bad row (unless data.bad_rows is skip), an unreadable file, or nothing left to train on.
    """
    if data.format == "tokens":
        raise DataError("data.format 'tokens' is random ids made while training; there is no file to read")
    if data.chat_template is not None:
        tokenizer = tokenizer.with_chat_template(_read_template(data.chat_template))
    store, cached = _load_store(data, data.train, tokenizer, progress)
    if len(store) == 0:
        raise DataError(_nothing_left(store.meta["tally"], data))
    everything = np.arange(len(store), dtype=np.int64)
    if data.validation:
        held_store, _ = _load_store(data, data.validation, tokenizer, progress)
        if len(held_store) == 0:
            raise DataError("data.validation: " + _nothing_left(held_store.meta["tally"], data))
        train = TokenisedDataset(store, everything)
        validation: TokenisedDataset | None = TokenisedDataset(held_store, np.arange(len(held_store), dtype=np.int64))
    else:
        held = _held_out(store.hashes, data.validation_fraction, seed)
        train = TokenisedDataset(store, everything[~held])
        validation = TokenisedDataset(store, everything[held]) if held.any() else None
    summary = summarise(store, train.hashes, validation.hashes if validation else None, train.lengths, cached)
    return TrainingData(train, validation, summary, tokenizer)


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template {path} can't be read: {error}") from None


def _nothing_left(tally: dict[str, Any], data: DataSection) -> str:
    if tally["rows"] == 0:
        return f"no rows in {', '.join(data.train)}"
    return (
        f"none of {tally['rows']} rows can be trained on: {tally['skipped']} bad, {tally['too_long']} longer than "
        f"data.max_length ({data.max_length}), {tally['dropped']} with no trained token within it"
    )


def _held_out(hashes: NDArray[np.uint64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which documents are kept for validation: about `fraction`, chosen by content, equal ones on the same side.

    None where the fraction is less than half a document (so few rows are all needed), and never all of them.
    """
    held = np.zeros(len(hashes), dtype=np.bool_)
    mixed = _mixed(hashes, seed)
    order = np.argsort(mixed, kind="stable")
    if fraction == 0 or len(hashes) == 0 or mixed[order[0]] == mixed[order[-1]]:
        return held
    want = min(math.floor(fraction * len(hashes) + 0.5), len(hashes) - 1)
    if want == 0:
        return held
    last = mixed[order[want - 1]]
    if last == mixed[order[-1]]:
        last = mixed[mixed < last].max()
    return mixed <= last


def _mixed(hashes: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Hashes scrambled by the seed (a permutation of the 64-bit numbers: splitmix64's finaliser)."""
    with np.errstate(over="ignore"):
        z = hashes ^ np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & (2**64 - 1))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _load_store(
    data: DataSection, entries: Sequence[str], tokenizer: Tokenizer, progress: Progress | None
) -> tuple[DocumentStore, bool]:
    sources = find_sources(entries)

    def write(writer: StoreWriter) -> dict[str, Any]:
        return _encode_all(writer, data, sources, tokenizer, progress)

    fingerprints = [source.fingerprint() for source in sources] if data.cache else [None]
    if None in fingerprints:
        return temporary_store(write), False
    section = data.model_dump(
        exclude={"train", "validation", "validation_fraction", "packing", "workers", "cache", "chat_template"}
    )
    names = [source.name for source in sources]
    key = json.dumps([_code_fingerprint(), names, fingerprints, section, tokenizer.fingerprint], sort_keys=True)
    return cached_store(hashlib.sha256(key.encode()).hexdigest(), write)


@cache
def _code_fingerprint() -> str:
    """A hash of the code that makes tokens of text: another version never reads this one's cache."""
    digest = hashlib.sha256(tokenizers.__version__.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _encode_all(
    writer: StoreWriter, data: DataSection, sources: Sequence[Source], tokenizer: Tokenizer, progress: Progress | None
) -> dict[str, Any]:
    """Encodes every source into the writer. Returns the store's metadata."""
    tally = Tally(stop=data.bad_rows == "stop", too_long_stops=data.too_long == "stop", max_length=data.max_length)
    formats: dict[str, str] = {}
    settings = EncodeSettings(data.max_length, data.too_long, data.train_on, data.system, data.template_arguments)
    left = data.max_rows
    for number, source in enumerate(sources):
        rows = islice(read_rows(source, data.encoding), left)
        head = list(islice(rows, _LOOK_AT))
        formats[source.name] = _format_of(data, source, head)
        jobs = ((formats[source.name], batch) for batch in _batches(chain(head, rows)))
        done = 0
        workers = available_cores() if data.workers is None else data.workers
        for batch, encoded in _encoded(tokenizer, settings, jobs, workers):
            tally.add(source.name, batch, encoded)
            writer.append(encoded, number)
            done += batch
            if progress is not None:
                progress("tokenising", tally.rows, left or 0)
        left = None if left is None else left - done
        if left == 0:
            break
    return {"files": [source.name for source in sources], "formats": formats, "tally": tally.as_dict()}


def _encoded(
    tokenizer: Tokenizer, settings: EncodeSettings, jobs: Iterator[tuple[str, list[Row]]], workers: int
) -> Iterator[tuple[int, EncodedRows]]:
    sizes: list[int] = []

    def counted() -> Iterator[tuple[str, list[Row]]]:
        for job in jobs:
            sizes.append(len(job[1]))
            yield job

    results = ordered_map(
        encode_rows, (tokenizer, settings), counted(), workers=workers, in_process=_IN_PROCESS_BATCHES
    )
    for i, encoded in enumerate(results):
        yield sizes[i], encoded


def _format_of(data: DataSection, source: Source, head: list[Row]) -> str:
    """The recipe's format, else the one that the first rows have."""
    if data.format != "auto":
        return data.format
    good = [row.value for row in head if row.problem is None]
    found = detect_format(good)
    if found is not None:
        return found
    if not good:
        return "text"  # no rows, or bad ones that will be reported as such
    keys = sorted({str(key) for value in good if isinstance(value, dict) for key in value})
    raise DataError(
        f"{source.name}: the format can't be told from the keys {', '.join(keys) or '(none)'}; expected "
        f"instruction/output, messages, conversations, text, or chosen/rejected"
    )


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield batch
