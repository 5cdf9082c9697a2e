"""JSON with comments: what is read, and where what is not read stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.errors import RecipeError
from tunesmith.parallel.deepspeed_json import read_commented_json

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


def _read(folder: Path, text: str) -> object:
    path = folder / "ds.json"
    path.write_text(text, encoding="utf-8")
    return read_commented_json(path)


def test_comments_and_last_commas_are_passed_over(tmp_path: Path) -> None:
    text = '\ufeff{ // a\n "a": [1, 2.5e3, /* , */ "//no comment", null,],\n /* b\n */ "b": {"c": true,},}\n// end'
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    file = read_commented_json(path)
    assert file.value == {"a": [1, 2500.0, "//no comment", None], "b": {"c": True}}
    assert file.lines[("b", "c")] == 4
    assert file.where("b", "c") == f"{path}:4"


@given(st.dictionaries(st.text(), _VALUES, max_size=4), st.sampled_from([None, 1, 4]))
def test_plain_json_reads_the_same(tmp_path_factory: pytest.TempPathFactory, value: dict, indent: int | None) -> None:
    path = tmp_path_factory.getbasetemp() / "plain.json"
    path.write_text(json.dumps(value, indent=indent), encoding="utf-8")
    assert read_commented_json(path).value == value


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ('{"a": 1 "b": 2}', "1:9", "a comma"),
        ('{\n "a": tru}', "2:7", "a value must stand here, got 'tru'"),
        ('{"a": 1,\n  "a": 2}', "2:3", "'a' is given twice, first in line 1"),
        ('{"a": {"b": 1, "b": 2}}', "1:16", "'b' is given twice"),
        ('{"a": 1', "1:8", "the file's end"),
        ('{"a" 1}', "1:6", "a colon must follow 'a'"),
        ("{a: 1}", "1:2", "a key in double quotes"),
        ('{"a": .5}', "1:7", "a value must stand here"),
        ('{"a": 01}', "1:7", "no number"),
        ('{"a": NaN}', "1:7", "a value must stand here"),
        ('{"a": 1} x', "1:10", "nothing may follow"),
        ('{"a": 1 /* }', "1:9", "this comment has no end"),
        ('{"a": "x\ny"}', "1:9", "invalid control character"),
        ('{"a": "x', "1:7", "unterminated string"),
        ("", "1:1", "a value must stand here, got the file's end"),
    ],
)
def test_a_mistake_is_named_with_line_and_column(tmp_path: Path, text: str, where: str, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        _read(tmp_path, text)
    assert f"ds.json:{where}: " in str(caught.value)
    assert what in str(caught.value)


@pytest.mark.parametrize("text", ["[1]", '"x"', "3", "{" * 3 + '"a"', '{"a":' * 5000])
def test_what_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError):
        _read(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.json can't be read: No such file"):
        read_commented_json(tmp_path / "nowhere.json")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(RecipeError, match="no UTF-8"):
        read_commented_json(tmp_path / "latin.json")
