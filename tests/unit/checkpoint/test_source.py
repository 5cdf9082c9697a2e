"""resolve_model: where a model lives, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.checkpoint.source import resolve_model, resolve_tokenizer
from tunesmith.errors import ModelError
from tunesmith.recipe.load import recipe_from_mapping


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_chinese_path(tmp_path: Path) -> None:
    (tmp_path / "模型 一").mkdir()
    assert resolve_model(str(tmp_path / "模型 一")).is_dir()


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file: name the directory"):
        resolve_model(str(tmp_path / "model.safetensors"))


def test_a_revision_of_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="goes with a Hub id"):
        resolve_model(str(tmp_path), "main")


def test_neither_path_nor_id() -> None:
    with pytest.raises(ModelError, match="there is no model directory"):
        resolve_model("/nowhere/at/all")


def test_an_unknown_embedded_model_names_those_there_are() -> None:
    with pytest.raises(ModelError, match="no embedded model builtin:huge"):
        resolve_model("builtin:huge")
    with pytest.raises(ModelError, match="no embedded model"):
        resolve_model("builtin:../checkpoint")


def test_a_hub_id_downloads_no_pickle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("org/name", "v1") == tmp_path
    assert (asked["repo"], asked["revision"]) == ("org/name", "v1")
    assert not any("bin" in pattern or "pt" in pattern or "py" in pattern for pattern in asked["patterns"])


def test_a_name_that_the_hub_does_not_allow() -> None:
    """It ended in huggingface_hub's own ValueError."""
    with pytest.raises(ModelError, match="can't be had from the Hub"):
        resolve_model("some--body/no..model")


def test_an_unreachable_hub_is_one_line() -> None:
    """The tests run offline, so any download fails."""
    with pytest.raises(ModelError, match="can't be had from the Hub") as caught:
        resolve_model("org/no-such-model")
    assert "\n" not in str(caught.value)


def test_a_recipe_may_name_another_tokenizer(tmp_path: Path) -> None:
    own = recipe_from_mapping({"model": {"path": str(tmp_path)}})
    assert resolve_tokenizer(own) == tmp_path
    other = recipe_from_mapping({"model": {"path": str(tmp_path)}, "data": {"tokenizer": "builtin:tiny"}})
    assert resolve_tokenizer(other) == resolve_model("builtin:tiny")
