"""`tunesmith train`: what the command line makes of a recipe."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.cli.main import run
from tunesmith.cli.train import _certify, _recipe
from tunesmith.errors import DataError, RecipeError, VerificationError
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.verify.certificate import LEFT_TO_VERIFY


def test_data_of_the_command_line_is_taken_as_it_is_written(tmp_path: Path) -> None:
    """Names went through Python's repr into YAML, where a backslash or a wide space became other characters."""
    names = ["it's \\n.jsonl", "全\u3000角.jsonl", 'a "b".jsonl', "x: [y] # z.txt"]
    (tmp_path / "r.yaml").write_text("data: {train: [other.jsonl]}\n", encoding="utf-8")
    assert _recipe(str(tmp_path / "r.yaml"), names, None, [], None).data.train == names
    assert _recipe("builtin:tiny", names, None, [], None).data.train == names


def certificate(**passed: bool) -> SimpleNamespace:
    """A certificate of checks by name."""
    checks = [
        SimpleNamespace(name=n.replace("_", " "), passed=ok, detail=f"why {n}", duration_s=0.4)
        for n, ok in passed.items()
    ]
    skipped = {"merge parity": LEFT_TO_VERIFY, "resume equality": LEFT_TO_VERIFY, "other": "not here"}
    return SimpleNamespace(checks=checks, skipped=skipped, cached=False, duration_s=1.0)


def certify_gives(monkeypatch: pytest.MonkeyPatch, made: SimpleNamespace) -> None:
    monkeypatch.setattr("tunesmith.verify.certificate.certify", lambda *_, **__: made)


def test_a_failed_certificate_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It named the check alone, so that the reason was to be looked up in certificate.json."""
    certify_gives(monkeypatch, certificate(a=True, packing_isolation=False))
    with pytest.raises(
        VerificationError, match=r"\(packing isolation\).*: why packing_isolation; see .*certificate\.json"
    ):
        _certify(recipe_from_mapping({}), tmp_path)


def test_data_that_teaches_nothing_is_no_failure_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certify_gives(monkeypatch, certificate(a=True, mask_shown=False))
    with pytest.raises(DataError, match=r"^why mask_shown$"):
        _certify(recipe_from_mapping({}), tmp_path)


def test_the_certificate_says_how_many_checks_there_are_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It said 9 where `tunesmith verify` said 11."""
    certify_gives(monkeypatch, certificate(a=True, b=True))
    line = _certify(recipe_from_mapping({}), tmp_path)
    assert "2 quick checks passed" in line
    assert f"tunesmith verify {tmp_path} runs all 4" in line


def test_a_bad_row_is_said_as_data_says_it_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The certificate failed with "the run would be silently wrong", exit code 1, and a run directory stayed."""
    monkeypatch.chdir(tmp_path)
    rows: list[Any] = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(60)]
    for bad in (6, 50):  # within what the certificate looks at, and beyond
        broken = [*rows[:bad], {"instruction": "no answer"}, *rows[bad + 1 :]]
        (tmp_path / "bad.json").write_text(json.dumps(broken, indent=0), encoding="utf-8")
        assert run(["data", "bad.json"]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"bad.json: row {bad + 1}" in said
        assert run(["train", "builtin:tiny", "--data", "bad.json"]) == 2
        err = capsys.readouterr().err
        assert err.splitlines()[-1] == said
        assert "certificate failed" not in err
        assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]


def test_data_given_as_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was "en.json is a file: name the directory that holds config.json"."""
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/en.json").write_text("[]", encoding="utf-8")
    for given in ("mine/en.json", "mine", "gone.jsonl", "builtin:shop?rows=5"):
        command = f"tunesmith train builtin:tiny --data {shlex.quote(given)}"
        with pytest.raises(RecipeError, match=f"^{re.escape(given)} looks like data: {re.escape(command)}$"):
            _recipe(given, [], None, [], None)
    with pytest.raises(RecipeError, match="say what to train builtin:tiny on"):
        _recipe("builtin:tiny", [], None, [], None)
