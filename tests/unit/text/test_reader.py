"""Files of every kind, and every way a file can be bad: always a line and a reason, never an exception."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import DataError
from tunesmith.text import reader, strict_json
from tunesmith.text.files import find_sources
from tunesmith.text.formats import PlainText
from tunesmith.text.reader import Row, read_rows
from tunesmith.text.strict_json import ArrayReader, StrictJSONError, parse


def rows_of(path: Path, encoding: str = "utf-8") -> list[Row]:
    (source,) = find_sources([str(path)])
    return list(read_rows(source, encoding))


def rows_of_bytes(folder: Path, name: str, content: bytes, encoding: str = "utf-8") -> list[Row]:
    (folder / name).write_bytes(content)
    return rows_of(folder / name, encoding)


ROWS = [{"text": "一"}, {"text": "二"}, {"text": "three"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("数据.jsonl", LINES),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("a.jsonl", LINES.rstrip()),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("a.json", b"\xef\xbb\xbf\n" + json.dumps(ROWS, ensure_ascii=False).encode()),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.json.xz", lzma.compress(json.dumps(ROWS).encode())),
        ("a.ndjson.bz2", bz2.compress(LINES)),
        ("a.csv", "text\r\n一\n二\nthree\n".encode()),
        ("a.tsv", 'text\n一\n二\n"three"\n'.encode()),
    ],
)
def test_same_rows_in_every_kind_of_file(name: str, content: bytes, tmp_path: Path) -> None:
    assert [(row.value, row.problem) for row in rows_of_bytes(tmp_path, name, content)] == [(r, None) for r in ROWS]


def test_lines_are_counted(tmp_path: Path) -> None:
    assert [row.line for row in rows_of_bytes(tmp_path, "a.jsonl", b'{"a": 1}\n\n{"a": 2}')] == [1, 3]
    assert [row.line for row in rows_of_bytes(tmp_path, "a.json", b'[\n{"a":\n1},\n{"a": 2}]')] == [2, 4]
    assert [row.line for row in rows_of_bytes(tmp_path, "a.csv", b'a\n1\n"2\n2"\n3')] == [2, 4, 5]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert [row.value for row in rows_of(tmp_path / "a.parquet")] == ROWS
    torn = (tmp_path / "a.parquet").read_bytes()[:40]
    assert "torn" in (rows_of_bytes(tmp_path, "b.parquet", torn)[0].problem or "")


def test_other_encoding(tmp_path: Path) -> None:
    raw = LINES.decode().encode("gb18030")
    assert [row.value for row in rows_of_bytes(tmp_path, "a.jsonl", raw, "gb18030")] == ROWS
    raw = '{"text": "今天天气很好"}'.encode("gb18030")
    assert "data.encoding=gb18030" in (rows_of_bytes(tmp_path, "a.jsonl", raw)[0].problem or "")
    array = b"[" + raw + b"]"
    assert "data.encoding=gb18030" in (rows_of_bytes(tmp_path, "a.json", array)[-1].problem or "")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_utf16_names_the_key(encoding: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.encoding"):
        rows_of_bytes(tmp_path, "a.jsonl", LINES.decode().encode(encoding))


@pytest.mark.parametrize("encoding", ["klingon", "utf-16"])
def test_impossible_encoding(encoding: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.encoding"):
        rows_of_bytes(tmp_path, "a.jsonl", LINES, encoding)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "not JSON"),
        (b'{"a": "\xff"}', "data.encoding"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b"[" * 100_000, "too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"\x00", "not JSON"),
    ],
)
def test_bad_line_stands_between_good_ones(line: bytes, reason: str, tmp_path: Path) -> None:
    first, bad, last = rows_of_bytes(tmp_path, "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    assert (first.value, last.value, last.line) == ({"a": 1}, {"a": 2}, 3)
    assert bad.line == 2
    assert reason in (bad.problem or "")


@pytest.mark.parametrize(
    ("item", "reason"),
    [(b'{"a": NaN}', "NaN"), (b'{"a": 1, "a": 2}', "twice"), (b'{"a": ' + b"9" * 5000 + b"}", "not JSON")],
)
def test_bad_item_stands_between_good_ones(item: bytes, reason: str, tmp_path: Path) -> None:
    rows = rows_of_bytes(tmp_path, "a.json", b'[{"a": 1},\n' + item + b',\n{"a": 2}]')
    if b"9999" in item:  # no parser of ours can step over it
        assert rows[-1].last
    else:
        assert [row.value for row in rows] == [{"a": 1}, None, {"a": 2}]
    assert rows[1].line == 2
    assert reason in (rows[1].problem or "")


@pytest.mark.parametrize("step", [1, 7, 4096])
@pytest.mark.parametrize(
    ("row", "place", "excerpt"),
    [
        ('{\n  "问": "甲"\n  "答": "乙"\n}', "line 5, column 3", ', at the arrow: →"答": "乙"'),
        (
            '{\n  "问": "甲",\n  "答"： "乙"\n}',
            "line 5, column 6",
            ', at the arrow: "答"→： "乙"; JSON wants : and not ：',
        ),
        ('{"问": "甲" "答": "乙"}', "line 3, column 11", ', at the arrow: {"问": "甲" →"答": "乙"}'),
        ('{"问": "甲"},\n  {\n  "答" 1}', "line 5, column 7", ', at the arrow: "答" →1}'),
    ],
)
def test_a_comma_that_is_missing_inside_a_row_is_shown(row: str, place: str, excerpt: str, step: int) -> None:
    """The row's first line was named, and a character counted from some place in the file."""
    stream = io.StringIO('[\n{"问": "零"},\n' + row + ',\n{"问": "丙"}]')
    *_, (line, value, problem) = ArrayReader(lambda _: stream.read(step))
    assert (line, value) == (4 if "},\n" in row else 3, None)
    assert problem is not None
    assert f" {place}{excerpt}" in problem


@pytest.mark.parametrize("between", ["\n ", "，\n "])
def test_a_comma_that_is_missing_between_rows_is_shown(between: str, tmp_path: Path) -> None:
    bad = rows_of_bytes(tmp_path, "a.json", ('[{\n"a": 1}' + between + '{"a": 2}]').encode())[-1]
    want = 'at line 3, column 2, at the arrow: →{"a": 2}]'
    if "，" in between:
        want = 'at line 2, column 8, at the arrow: "a": 1}→，; JSON wants , and not ，'
    assert (bad.row, bad.line) == (1, 1)
    assert want in (bad.problem or "")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_row_of_several_lines_without_an_array_says_so(name: str, tmp_path: Path) -> None:
    rows = rows_of_bytes(tmp_path, name, b'{\n"a": 1\n}\n')
    assert "must stand in one array" in (rows[0].problem or "")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"a": 1}', "ends without ]"),
        (b'[{"a": 1} {"a": 2}]', "a comma or ] is missing"),
        (b'[{"a": 1}, {"a"', "not JSON"),
        (b'[{"a": 1}]\n[1]', "more after"),
        (b'[{"a": 1}, \xff]', "data.encoding"),
    ],
)
def test_torn_array_keeps_what_was_whole(content: bytes, reason: str, tmp_path: Path) -> None:
    rows = rows_of_bytes(tmp_path, "a.json", content)
    assert reason in (rows[-1].problem or "")
    assert rows[-1].last or rows[-1].problem


@pytest.mark.parametrize(
    ("between", "end", "place", "reason"),
    [
        (",\n", "\n]\n", None, None),
        (",\n", ",\n]\n", (2, 3), "the comma after it is one too many"),
        (",\n", "\n,\n\n]\n", (2, 4), "the comma after it is one too many"),
        (",\n", "", (2, 3), "ends without ]"),
        ("\n", "\n]\n", (1, 2), "a comma or ] is missing after it"),
        (",\n", "]\nx", (2, 4), "more after"),
    ],
)
def test_what_is_wrong_between_rows_names_the_row_before(
    between: str, end: str, place: tuple[int, int] | None, reason: str | None, tmp_path: Path
) -> None:
    """A comma after the second of two rows was a mistake in "row 3". Rows of what is well formed are as they were."""
    content = '[\n{"a": 1}' + between + '{"a": 2}' + end
    rows = rows_of_bytes(tmp_path, "a.json", content.encode())
    whole = [Row(2, {"a": 1}, row=1), Row(3, {"a": 2}, row=2)]
    if place is None or reason is None:
        assert rows == whole
        return
    *good, bad = rows
    assert good == whole[: place[0]]
    assert (bad.row, bad.line, bad.last) == (*place, True)
    assert reason in (bad.problem or "")


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress)])
def test_truncated_archive(suffix: str, pack: object, tmp_path: Path) -> None:
    import random

    generator = random.Random(0)
    content = "".join(json.dumps({"text": str(generator.random())}) + "\n" for _ in range(3000)).encode()
    packed: bytes = pack(content)  # type: ignore[operator]
    cut = packed[: len(packed) * 3 // 4]
    if suffix == "bz2":  # one block: nothing of it can be read
        with pytest.raises(DataError, match="torn"):
            rows_of_bytes(tmp_path, f"a.jsonl.{suffix}", cut)
        return
    rows = rows_of_bytes(tmp_path, f"a.jsonl.{suffix}", cut)
    assert "torn" in (rows[-1].problem or "")
    assert len(rows) > 1
    assert all(row.problem is None for row in rows[:-1])
    with pytest.raises(DataError, match="torn"):
        rows_of_bytes(tmp_path, f"b.jsonl.{suffix}", b"not packed at all")


def test_endless_line_is_passed_over_without_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_ROW_BYTES", 100)
    content = b'{"a": 1}\n{"a": "' + b"x" * 1000 + b'"}\n{"a": 2}\n'
    first, bad, last = rows_of_bytes(tmp_path, "a.jsonl", content)
    assert (first.value, last.value, last.line) == ({"a": 1}, {"a": 2}, 3)
    assert "longer than" in (bad.problem or "")
    monkeypatch.setattr(strict_json, "MAX_ROW_CHARACTERS", 100)
    monkeypatch.setattr(strict_json, "_CHUNK", 64)
    rows = rows_of_bytes(tmp_path, "a.json", b'[{"a": 1}, {"a": "' + b"x" * 1000 + b'"}, {"a": 2}]')
    assert "longer than" in (rows[1].problem or "")


def test_text_is_cut_at_separators_and_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PIECE_CHARACTERS", 10)
    content = "first\n\nstory\n<|endoftext|>\n" + "长" * 12 + "\nend\n"
    rows = rows_of_bytes(tmp_path, "a.txt", content.encode())
    assert [row.value for row in rows] == [
        PlainText("first\n\nstory", True, True, pieces=True),
        PlainText("长" * 12 + "\n", True, False, pieces=True),
        PlainText("end", False, True, pieces=True),
    ]
    assert [row.line for row in rows] == [1, 5, 6]


def test_csv_with_ragged_rows(tmp_path: Path) -> None:
    rows = rows_of_bytes(tmp_path, "a.csv", b"a,b\n1,2\n3\n4,5,6\n")
    assert [row.problem for row in rows] == [None, "no field 'b'", "more fields than the header"]


def test_folders_and_names(tmp_path: Path) -> None:
    for name in ("乙.jsonl", "甲/a.json", "README.md", ".hidden.jsonl", "dataset_info.json", "b.txt.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [Path(source.name).name for source in find_sources([str(tmp_path), str(tmp_path / "乙.jsonl")])]
    assert sorted(found) == sorted(["乙.jsonl", "a.json", "b.txt.gz"])


@pytest.mark.parametrize(
    ("entry", "reason"),
    [("missing.jsonl", "no file or folder"), ("a.zip", "unknown suffix"), ("empty", "holds no data files")],
)
def test_what_is_no_source(entry: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=reason):
        find_sources([str(tmp_path / entry)])


def test_hub_id_without_a_network_says_so() -> None:
    pytest.importorskip("datasets")
    (source,) = find_sources(["nobody/no-such-data-set"])
    assert source.kind == "hub"
    with pytest.raises(DataError, match="without a network"):
        list(read_rows(source))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, max_size=8), st.integers(1, 9), st.sampled_from([None, 1]), st.booleans())
def test_array_reader_equals_json(values: list[object], step: int, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    stream = io.StringIO(text)
    items = list(ArrayReader(lambda _: stream.read(step)))
    assert [(value, problem) for _, value, problem in items] == [(value, None) for value in values]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='{}[]",:\\ntrue01.eE-NaI \n', max_size=30))
def test_no_text_breaks_the_readers(text: str) -> None:
    with suppress(StrictJSONError):
        parse(text)
    stream = io.StringIO("[" + text)
    for line, _, _ in ArrayReader(lambda _: stream.read(3)):
        assert line >= 1


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    """Was: opening a named pipe with no writer waited for ever."""
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="is a pipe or a device, not a file"):
        find_sources([str(tmp_path / "rows.jsonl")])


def test_an_empty_entry_is_refused() -> None:
    """Was: an empty name meant the current folder, whatever lay there."""
    with pytest.raises(DataError, match="is empty"):
        find_sources([" "])
