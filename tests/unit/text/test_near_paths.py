"""A path of data that is misspelt, or that lies one folder further, is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.errors import DataError
from tunesmith.text.files import find_sources


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("data/shop.json", "data/notes.md", "店铺/问答.jsonl", "top.csv", ".hidden/secret.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("data/shp.json", "./data/shop.json"),
        ("dta/shop.jsonl", "./data/shop.json"),
        ("shop.json", "./data/shop.json"),
        ("data/top.csv", "./top.csv"),
        ("Top.CSV", "./top.csv"),
        ("data/shop.csv", "./data/shop.json"),
        ("店铺/问答.json", "./店铺/问答.jsonl"),
        ("./data/shpo.json", "./data/shop.json"),
    ],
)
def test_the_path_that_was_meant(here: Path, typed: str, meant: str) -> None:
    with pytest.raises(DataError, match="there is no file or folder") as said:
        find_sources([typed])
    assert f"{typed}, did you mean {meant}?;" in str(said.value)


def test_an_absolute_path_stays_absolute(here: Path) -> None:
    with pytest.raises(DataError) as said:
        find_sources([str(here / "data" / "shopp.json")])
    assert f"did you mean {here / 'data' / 'shop.json'}?" in str(said.value)


@pytest.mark.parametrize("typed", ["wholly/else.json", "notes.json.gz", "secret.json", "data/zzz.json"])
def test_nothing_is_guessed(here: Path, typed: str) -> None:
    with pytest.raises(DataError) as said:
        find_sources([typed])
    assert "did you mean" not in str(said.value)


def test_a_missing_file_is_not_called_one_of_training(here: Path) -> None:
    """Validation and questions to answer come here too."""
    with pytest.raises(DataError) as said:
        find_sources(["nothing.like.this.json"])
    assert "data.train" not in str(said.value)
    with pytest.raises(DataError, match="an entry of the data is empty"):
        find_sources([" "])
