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
    with pytest.raises(ModelError, match="there is no model or run directory"):
        resolve_model("/nowhere/at/all")


def test_an_unknown_embedded_model_names_those_there_are() -> None:
    with pytest.raises(ModelError, match="no embedded model builtin:huge"):
        resolve_model("builtin:huge")
    with pytest.raises(ModelError, match="no embedded model"):
        resolve_model("builtin:../checkpoint")
    with pytest.raises(ModelError, match=r"builtin:tinny, did you mean 'builtin:tiny'\?"):
        resolve_model("builtin:tinny")


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
    """The tests run offline, so any download fails. It ended in "Got: ConnectError: [Errno -2] ..."."""
    with pytest.raises(ModelError, match="can't be had from the Hub: the Hub can't be reached") as caught:
        resolve_model("org/no-such-model")
    assert "\n" not in str(caught.value) and "Got:" not in str(caught.value)


def test_a_recipe_may_name_another_tokenizer(tmp_path: Path) -> None:
    own = recipe_from_mapping({"model": {"path": str(tmp_path)}})
    assert resolve_tokenizer(own) == tmp_path
    other = recipe_from_mapping({"model": {"path": str(tmp_path)}, "data": {"tokenizer": "builtin:tiny"}})
    assert resolve_tokenizer(other) == resolve_model("builtin:tiny")


@pytest.mark.parametrize("name", ["runs/shoop-2", "./shoop-2", "~/shoop-2", "mine/shoop-2", "runs/none/deeper"])
def test_what_looks_like_a_path_is_never_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """The bug: `tunesmith chat runs/nope` went to the Hub, and said that there was no connection."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("mine/shop-1", "shop-1", "runs"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(ModelError, match="there is no model or run directory"):
        resolve_model(name)


def test_a_missing_run_names_its_neighbours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "shop-1").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"'runs/shoop-1', did you mean 'shop-1'\? \(runs holds shop-1\)"):
        resolve_model("runs/shoop-1")


def test_a_revision_says_that_it_is_one_of_the_hubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of an organisation's name is no reason not to find its models."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: str(tmp_path / repo))
    assert resolve_model("org/name", "main") == tmp_path / "org" / "name"
