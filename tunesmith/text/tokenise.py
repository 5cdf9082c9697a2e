"""The files of a data section to a store of tokenised documents: read, encoded in processes, cached by content."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import tokenizers

from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataSection
from tunesmith.text.encoding import EncodedRows, EncodeSettings, encode_rows
from tunesmith.text.files import Source, find_sources
from tunesmith.text.formats import RowError, detect_format, to_example
from tunesmith.text.pairs import encode_pairs
from tunesmith.text.reader import Row, read_rows
from tunesmith.text.row_keys import read_columns
from tunesmith.text.store import DocumentStore, StoreWriter, cached_store, temporary_store
from tunesmith.text.summary import Progress, Tally, bad_row
from tunesmith.text.tokenizer import Tokenizer
from tunesmith.text.workers import available_cores, ordered_map

Encode = Callable[[Tokenizer, EncodeSettings, str, Sequence[Row]], EncodedRows]
_BATCH_ROWS = 500
_IN_PROCESS_BATCHES = 10
_LOOK_AT = 32  # rows the format is detected from
_QUICK_ROWS = 1000  # looked at before anything is begun, in some 50 ms ...
_QUICK_BYTES = 4 * 2**20  # ... of a file up to this size; of a larger one the format's rows


def with_template(data: DataSection, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with data.chat_template, where the recipe names one.

    Raises: DataError when the file can't be read.
    """
    if data.chat_template is None:
        return tokenizer
    return tokenizer.with_chat_template(_read_template(data.chat_template))


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template {path} can't be read: {error}") from None


def nothing_left(tally: dict[str, Any], data: DataSection) -> str:
    """Why a store has no documents, in a line."""
    if tally["rows"] == 0:
        return f"no rows in {', '.join(data.train)}"
    return (
        f"none of {tally['rows']} rows can be trained on: {tally['skipped']} bad, {tally['too_long']} longer than "
        f"data.max_length ({data.max_length}), {tally['dropped']} with no trained token within it"
    )


def load_store(
    data: DataSection,
    entries: Sequence[str],
    tokenizer: Tokenizer,
    progress: Progress | None,
    *,
    pairs: bool = False,
) -> tuple[DocumentStore, bool]:
    """The tokenised documents of data.train's or data.validation's entries, and whether the cache had them.

    Args: `pairs`: the rows are preference pairs; documents 2i and 2i + 1 are pair i's chosen and rejected.
    Raises: DataError for files that can't be read, bad rows, and rows of the other kind.
    """
    sources = find_sources(entries)

    def write(writer: StoreWriter) -> dict[str, Any]:
        return _encode_all(writer, data, sources, tokenizer, progress, pairs)

    fingerprints = [source.fingerprint() for source in sources] if data.cache else [None]
    if None in fingerprints:
        return temporary_store(write), False
    section = data.model_dump(
        exclude={"train", "validation", "validation_fraction", "packing", "workers", "cache", "chat_template"}
    )
    names = [source.name for source in sources]
    key = json.dumps([_code_fingerprint(), pairs, names, fingerprints, section, tokenizer.fingerprint], sort_keys=True)
    return cached_store(hashlib.sha256(key.encode()).hexdigest(), write)


@cache
def _code_fingerprint() -> str:
    """A hash of the code that makes tokens of text: another version never reads this one's cache."""
    digest = hashlib.sha256(tokenizers.__version__.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _encode_all(
    writer: StoreWriter,
    data: DataSection,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    progress: Progress | None,
    pairs: bool,
) -> dict[str, Any]:
    """Encodes every source into the writer. Returns the store's metadata."""
    tally = Tally(stop=data.bad_rows == "stop", too_long_stops=data.too_long == "stop", max_length=data.max_length)
    formats: dict[str, str] = {}
    columns: dict[str, list[str]] = {}
    settings = EncodeSettings(data.max_length, data.too_long, data.train_on, data.system, data.template_arguments)
    left, encode = data.max_rows, encode_pairs if pairs else encode_rows
    for number, source in enumerate(sources):
        rows = islice(read_rows(source, data.encoding), left)
        head = list(islice(rows, _LOOK_AT))
        formats[source.name] = _format_of(data, source, head) or ("preference" if pairs else "text")
        _check_kind(source.name, formats[source.name], pairs)
        columns[source.name] = read_columns([row.value for row in head], formats[source.name])
        jobs = ((formats[source.name], batch) for batch in _batches(chain(head, rows)))
        done = 0
        workers = available_cores() if data.workers is None else data.workers
        for batch, encoded in _encoded(encode, tokenizer, settings, jobs, workers):
            tally.add(source.name, batch, encoded)
            writer.append(encoded, number)
            done += batch
            if progress is not None:
                progress("tokenising", tally.rows, left or 0)
        left = None if left is None else left - done
        if left == 0:
            break
    files = [source.name for source in sources]
    return {"files": files, "formats": formats, "columns": columns, "tally": tally.as_dict()}


def refuse_at_once(data: DataSection) -> None:
    """Look at the first rows of data.train and data.validation, before anything else is begun and without a tokenizer.

    What is wrong further on, or to the chat template alone, is found when the rows are encoded.
    Raises: DataError for a source that can't be read or holds preference pairs, for a bad row (unless data.bad_rows
        is skip), and where data.train has no rows.
    """
    if not _look_at(data, data.train):
        raise DataError(nothing_left({"rows": 0}, data))
    _look_at(data, data.validation)


def _look_at(data: DataSection, entries: Sequence[str]) -> int:
    """How many rows were looked at. Raises: DataError."""
    seen = 0
    for source in find_sources(entries):
        is_small = source.path is not None and source.path.stat().st_size <= _QUICK_BYTES
        most = _QUICK_ROWS if is_small else _LOOK_AT
        if data.max_rows is not None:
            most = min(most, data.max_rows - seen)
        rows = list(islice(read_rows(source, data.encoding), most))
        format_name = _format_of(data, source, rows[:_LOOK_AT]) or "text"
        _check_kind(source.name, format_name, pairs=False)
        if data.bad_rows == "stop":
            _refuse_bad(source.name, format_name, rows)
        seen += len(rows)
        if seen >= _QUICK_ROWS or (data.max_rows is not None and len(rows) == most):
            break
    return seen


def _refuse_bad(file: str, format_name: str, rows: Sequence[Row]) -> None:
    for row in rows:
        try:
            if row.problem is not None:
                raise RowError(row.problem)
            to_example(row.value, format_name)
        except RowError as error:
            raise bad_row(file, row.place, str(error)) from None


def _check_kind(file: str, format_name: str, pairs: bool) -> None:
    if pairs and format_name != "preference":
        raise DataError(
            f"{file} holds no preference pairs, its format is {format_name}; a pair has 'chosen' and 'rejected' "
            f"beside a prompt"
        )
    if not pairs and format_name == "preference":
        raise DataError(
            f"{file} holds preference pairs (chosen/rejected), and preference training (DPO) isn't there yet; "
            f"see the pairs with: tunesmith data {shlex.quote(file)}"
        )


def _encoded(
    encode: Encode,
    tokenizer: Tokenizer,
    settings: EncodeSettings,
    jobs: Iterator[tuple[str, list[Row]]],
    workers: int,
) -> Iterator[tuple[int, EncodedRows]]:
    sizes: list[int] = []

    def counted() -> Iterator[tuple[str, list[Row]]]:
        for job in jobs:
            sizes.append(len(job[1]))
            yield job

    results = ordered_map(encode, (tokenizer, settings), counted(), workers=workers, in_process=_IN_PROCESS_BATCHES)
    for i, encoded in enumerate(results):
        yield sizes[i], encoded


def first_format(data: DataSection) -> str | None:
    """The format of data.train's first source: the recipe's, else what its first rows look like (None: no rows).

    Raises: DataError when the file can't be read, or its rows look like nothing known.
    """
    if data.format != "auto":
        return data.format
    source = next(iter(find_sources(data.train)), None)
    return (
        None if source is None else _format_of(data, source, list(islice(read_rows(source, data.encoding), _LOOK_AT)))
    )


def _format_of(data: DataSection, source: Source, head: list[Row]) -> str | None:
    """The recipe's format, else the one that the first rows have; None without rows, or with bad ones only."""
    if data.format != "auto":
        return data.format
    good = [row.value for row in head if row.problem is None]
    found = detect_format(good)
    if found is not None:
        return found
    if not good:
        return None
    keys = sorted({str(key) for value in good if isinstance(value, dict) for key in value})
    raise DataError(
        f"{source.name}: the format can't be told from the keys {', '.join(keys) or '(none)'}; expected "
        f"question/answer, instruction/output, 问题/答案, 指令/输出, messages, conversations, text, or chosen/rejected"
    )


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield batch
