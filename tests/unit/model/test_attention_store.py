"""Attention choices on disk: found again for the same shape and candidates, and nothing that is damaged is believed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.model import attention_store
from tunesmith.model.attention_store import store_choice, store_path, stored_choice

SHAPE = {"device": "gpu", "num_tokens": 64, "is_even": True}
TIMES = {"varlen": 2.0, "dense-cudnn": 1.0}


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    found = tmp_path / "cache" / "choices.json"
    monkeypatch.setattr(attention_store, "store_path", lambda: found)
    return found


def test_a_choice_is_found_again_for_its_shape_and_candidates_only(path: Path) -> None:
    candidates = tuple(TIMES)
    assert stored_choice(SHAPE, candidates) is None
    store_choice(SHAPE, candidates, "dense-cudnn", TIMES)
    store_choice({**SHAPE, "num_tokens": 128}, candidates, "varlen", TIMES)
    assert stored_choice(SHAPE, candidates) == ("dense-cudnn", TIMES)
    assert stored_choice({**SHAPE, "num_tokens": 128}, candidates) == ("varlen", TIMES)
    assert stored_choice({**SHAPE, "num_tokens": 256}, candidates) is None
    assert stored_choice(SHAPE, (*candidates, "flex")) is None
    assert stored_choice(SHAPE, ("varlen",)) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"x": 1}'])
def test_a_damaged_file_is_no_choice_and_is_written_anew(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content, encoding="utf-8")
    assert stored_choice(SHAPE, tuple(TIMES)) is None
    store_choice(SHAPE, tuple(TIMES), "varlen", TIMES)
    assert stored_choice(SHAPE, tuple(TIMES)) == ("varlen", TIMES)


@pytest.mark.parametrize("entry", [None, 3, {}, {"candidates": list(TIMES), "kernel": "varlen", "milliseconds": None}])
def test_a_damaged_entry_is_no_choice(path: Path, entry: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_store, "_read", lambda _: {attention_store._name(SHAPE): entry})
    assert stored_choice(SHAPE, tuple(TIMES)) is None


def test_a_cache_that_can_not_be_written_is_no_error(path: Path) -> None:
    path.parent.parent.joinpath("cache").write_text("a file", encoding="utf-8")
    store_choice(SHAPE, tuple(TIMES), "varlen", TIMES)
    assert stored_choice(SHAPE, tuple(TIMES)) is None


def test_it_lies_below_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store_path.cache_clear()
    try:
        assert store_path().parent == tmp_path / "tunesmith" / "attention"
    finally:
        store_path.cache_clear()
