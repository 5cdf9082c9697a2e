"""`tunesmith train`: what the command line makes of a recipe."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tunesmith.cli.train import _certify, _recipe
from tunesmith.errors import VerificationError
from tunesmith.recipe.load import recipe_from_mapping


def test_data_of_the_command_line_is_taken_as_it_is_written(tmp_path: Path) -> None:
    """Names went through Python's repr into YAML, where a backslash or a wide space became other characters."""
    names = ["it's \\n.jsonl", "全\u3000角.jsonl", 'a "b".jsonl', "x: [y] # z.txt"]
    (tmp_path / "r.yaml").write_text("data: {train: [other.jsonl]}\n", encoding="utf-8")
    assert _recipe(str(tmp_path / "r.yaml"), names, None, [], None).data.train == names
    assert _recipe("builtin:tiny", names, None, [], None).data.train == names


def test_a_failed_certificate_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It named the check alone, so that a bad row of the data was to be looked up in certificate.json."""
    checks = [SimpleNamespace(name=n, passed=n == "a", detail=f"why {n}") for n in ("a", "mask shown")]
    monkeypatch.setattr("tunesmith.verify.certificate.certify", lambda *_, **__: SimpleNamespace(checks=checks))
    with pytest.raises(VerificationError, match=r"\(mask shown\).*: why mask shown; see .*certificate\.json"):
        _certify(recipe_from_mapping({}), tmp_path)
