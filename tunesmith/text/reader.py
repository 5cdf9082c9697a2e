"""Rows out of files, one at a time, each with its line, and with what is wrong with it instead of an exception.

Nothing is read whole: a line longer than the limit is passed over in pieces, arrays and compressed files
are streams.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tunesmith.errors import DataError, MissingExtraError
from tunesmith.text.files import Source, path_hint, split_suffixes
from tunesmith.text.formats import PlainText
from tunesmith.text.places import make_place
from tunesmith.text.sources import builtin_rows
from tunesmith.text.strict_json import ArrayReader, StrictJSONError, parse

MAX_ROW_BYTES = 64 * 2**20
PIECE_CHARACTERS = 2**18  # a plain text is tokenised in pieces of about this size, cut at line ends
DOCUMENT_SEPARATOR = "<|endoftext|>"  # alone on a line of a .txt file
_ONE_ARRAY = "a row of this file is one line; rows of several lines must stand in one array: [{...}, {...}]"
_TORN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, OSError)


@dataclass(frozen=True)
class Row:
    """A row and its line (from 1), or what is wrong with it. `last`: nothing more can be read of the file.

    row: its number (from 1) where the line alone would not find it; line 0: the file has no lines.
    """

    line: int
    value: Any = None
    problem: str | None = None
    last: bool = False
    row: int = 0

    @property
    def place(self) -> int:
        """Line and row as one number; `name_place` makes words of it."""
        return make_place(self.line, self.row)


def read_rows(source: Source, encoding: str = "utf-8") -> Iterator[Row]:
    """The rows of a source.

    Raises: DataError for a file that can't be read at all, or is in another encoding than UTF-8's kind.
    """
    if source.kind == "builtin":
        yield from (Row(i, value) for i, value in enumerate(builtin_rows(source.name.removeprefix("builtin:")), 1))
    elif source.kind == "hub":
        yield from _hub_rows(source.name)
    elif source.path is not None:
        yield from _file_rows(source.path, source.suffix, _checked_encoding(encoding))


def _file_rows(path: Path, suffix: str, encoding: str) -> Iterator[Row]:
    if suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    with _opened(path) as stream:
        start = _start_of(path, stream, encoding)
        lines = _Lines(stream, encoding, start)
        try:
            yield from _READERS[suffix if suffix != ".json" or start.lstrip()[:1] == b"[" else ".jsonl"](lines)
        except _TORN as error:
            yield Row(lines.number, None, f"the file is torn: {error}", last=True)


class _Lines:
    """Lines of a binary stream, decoded. `number` is the line last read."""

    def __init__(self, stream: IO[bytes], encoding: str, start: bytes) -> None:
        self.number = 1
        self.encoding = encoding
        self._stream = stream
        self._start = start

    def rows(self) -> Iterator[Row]:
        """Every line's text, its line end cut off."""
        number = 0
        while raw := self._readline(MAX_ROW_BYTES + 1):
            number += 1
            self.number = number
            if len(raw) > MAX_ROW_BYTES:
                if not raw.endswith(b"\n"):
                    self._pass_over_line()
                yield Row(number, None, f"the line is longer than {MAX_ROW_BYTES // 2**20} MiB")
                continue
            try:
                yield Row(number, raw.decode(self.encoding).rstrip("\r\n"))
            except UnicodeDecodeError as error:
                yield Row(number, None, _encoding_problem(raw, error))

    def characters(self) -> Callable[[int], str]:
        """A function that reads decoded text.

        Raises (when called): UnicodeDecodeError.
        """
        decoder = codecs.getincrementaldecoder(self.encoding)()

        def read(count: int) -> str:
            while True:
                raw = self._read(count)
                text = decoder.decode(raw, final=not raw)
                if text or not raw:
                    return text

        return read

    def _read(self, count: int) -> bytes:
        if self._start:
            raw, self._start = self._start[:count], self._start[count:]
            return raw
        return self._stream.read(count)

    def _readline(self, limit: int) -> bytes:
        if not self._start:
            return self._stream.readline(limit)
        head, newline, rest = self._start.partition(b"\n")
        self._start = rest
        return head + newline if newline else head + self._stream.readline(limit - len(head))

    def _pass_over_line(self) -> None:
        while (raw := self._stream.readline(MAX_ROW_BYTES)) and not raw.endswith(b"\n"):
            pass


def _json_lines(lines: _Lines) -> Iterator[Row]:
    for row in lines.rows():
        if row.problem is None and row.value.strip():
            try:
                yield Row(row.line, parse(row.value))
            except StrictJSONError as error:
                lone = row.line == 1 and row.value.strip() in ("{", "[")
                yield Row(row.line, None, _ONE_ARRAY if lone else str(error))
        elif row.problem is not None:
            yield row


def _json_array(lines: _Lines) -> Iterator[Row]:
    reader = ArrayReader(lines.characters())
    try:
        for line, value, problem in reader:
            lines.number = line
            yield Row(line, value, problem, last=reader.broken, row=reader.rows)
    except UnicodeDecodeError as error:
        yield Row(lines.number, None, _encoding_problem(error.object, error), last=True)


def _plain_text(lines: _Lines) -> Iterator[Row]:
    """Documents between separators, in pieces cut at line ends."""
    held: list[str] = []
    first, size, begins = 1, 0, True
    for row in lines.rows():
        if row.problem is not None:
            yield row
            continue
        if row.value.strip() == DOCUMENT_SEPARATOR:
            if "".join(held).strip():
                yield Row(first, PlainText("".join(held).strip("\n"), begins, True, pieces=True))
            held, size, first, begins = [], 0, row.line + 1, True
            continue
        if size > PIECE_CHARACTERS:
            yield Row(first, PlainText("".join(held), begins, False, pieces=True))
            held, size, first, begins = [], 0, row.line, False
        held.append(row.value + "\n")
        size += len(row.value) + 1
    if "".join(held).strip():
        yield Row(first, PlainText("".join(held).strip("\n"), begins, True, pieces=True))


def _separated(delimiter: str) -> Callable[[_Lines], Iterator[Row]]:
    def read(lines: _Lines) -> Iterator[Row]:
        csv.field_size_limit(MAX_ROW_BYTES)
        problems: list[Row] = []

        def texts() -> Iterator[str]:
            for row in lines.rows():
                if row.problem is None:
                    yield row.value + "\n"
                else:
                    problems.append(row)

        rows = csv.DictReader(texts(), delimiter=delimiter, strict=True)
        try:
            for value in rows:
                yield from _drained(problems)
                extra = value.pop(None, None)
                missing = [key for key, text in value.items() if text is None]
                problem = "more fields than the header" if extra else f"no field {missing[0]!r}" if missing else None
                yield Row(lines.number, value if problem is None else None, problem)
        except csv.Error as error:
            yield Row(lines.number, None, f"it is not CSV: {error}", last=True)
        yield from _drained(problems)

    return read


def _drained(problems: list[Row]) -> list[Row]:
    found, problems[:] = problems[:], []
    return found


_READERS: dict[str, Callable[[_Lines], Iterator[Row]]] = {
    ".json": _json_array,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".txt": _plain_text,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
}


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    try:
        stream = openers.get(split_suffixes(path)[1], open)(path, "rb")
    except OSError as error:
        raise DataError(f"{path} can't be opened: {error.strerror or error}") from None
    with stream:
        yield stream


def _start_of(path: Path, stream: IO[bytes], encoding: str) -> bytes:
    """The first bytes, the byte-order mark taken off, after a look at whether the encoding can be right."""
    try:
        start = stream.read(4096)
    except _TORN as error:
        raise DataError(f"{path}: the file is torn: {error}; fetch or pack it again") from None
    if start.startswith(codecs.BOM_UTF8):
        return start[3:]
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start[1:2] == b"\0" or start[:1] == b"\0":
        raise DataError(
            f"{path}: the file is UTF-16, not {encoding}; data.encoding takes encodings that keep ASCII as it is "
            f"(utf-8, gb18030, latin-1, ...); convert it first: iconv -f utf-16 -t utf-8 FILE > NEW"
        )
    return start


def _checked_encoding(encoding: str) -> str:
    try:
        name = codecs.lookup(encoding).name
        if "\n{}".encode(name) != b"\n{}":
            raise DataError(
                f"data.encoding {encoding!r} does not keep ASCII as it is; convert the file to utf-8 with iconv"
            )
    except LookupError:
        raise DataError(f"data.encoding {encoding!r} is unknown; for instance utf-8, gb18030, big5, latin-1") from None
    return name


def _encoding_problem(raw: bytes, error: UnicodeDecodeError) -> str:
    byte = f"byte 0x{error.object[error.start]:02x}"
    if error.encoding in ("utf-8", "utf8"):
        try:
            raw.decode("gb18030")
        except UnicodeDecodeError:
            pass
        else:
            return f"{byte} is not UTF-8; it may be GBK: try --set data.encoding=gb18030"
    return f"{byte} is not {error.encoding}: name the file's encoding: --set data.encoding=NAME"


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "data") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(0, value, row=number)
    except (OSError, pyarrow.ArrowException) as error:
        yield Row(0, None, f"the file is torn: {error}", last=True, row=number + 1)


def _hub_rows(name: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "data") from None
    identifier, _, split = name.partition(":")
    try:
        data = datasets.load_dataset(identifier, split=split or "train")
    except Exception as error:  # the library raises many kinds, some of its own
        reason = str(error).split("\n")[0][:200]
        raise DataError(
            f"the Hub data set {name} can't be loaded{path_hint(name)}: {reason}; without a network, name a "
            f"local file in data.train"
        ) from None
    yield from (Row(0, value, row=i) for i, value in enumerate(data, 1))
